import subprocess
import sys
from typing import Any

import pytest
import torch

from fedsim.learning.server_optimizers import AdamConfig, ServerOptimizer, SgdConfig, YogiConfig

CONFIGS = [SgdConfig(), SgdConfig(learning_rate=0.5, momentum=0.9), AdamConfig(), YogiConfig()]


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, generator=generator) for _ in range(count)]


def test_plain_sgd_is_federated_averaging() -> None:
    optimizer = ServerOptimizer(SgdConfig(), torch.ones(7))
    step = gradients(1)[0]
    assert torch.allclose(optimizer.step(step), 1 - step)


def test_momentum_accumulates() -> None:
    optimizer = ServerOptimizer(SgdConfig(momentum=0.5), torch.zeros(1))
    optimizer.step(torch.ones(1))
    assert optimizer.step(torch.ones(1)).item() == pytest.approx(-(1 + 1.5))


def test_yogi_follows_reddi_et_al() -> None:
    config = YogiConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=0.01)
    optimizer = ServerOptimizer(config, torch.zeros(7))
    weights, first, second = [0.0] * 7, [0.0] * 7, [0.01**2] * 7
    for gradient in gradients(4):
        moved = optimizer.step(gradient)
        for i, g in enumerate(gradient.tolist()):
            first[i] = 0.8 * first[i] + 0.2 * g
            sign = (second[i] > g * g) - (second[i] < g * g)
            second[i] -= 0.1 * g * g * sign
            weights[i] -= 0.1 * first[i] / (second[i] ** 0.5 + 0.01)
    assert moved.tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (SgdConfig(), {"lr": 1.0}),
        (SgdConfig(learning_rate=0.5, momentum=0.9, warmup_rounds=3), {"lr": 0.5, "momentum": 0.9}),
        (AdamConfig(decay_rounds=5), {"lr": 0.01}),
        (AdamConfig(beta1=0.5, beta2=0.9, epsilon=1e-3), {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3}),
    ],
)
def test_pytorch_gives_the_same_bits(config: SgdConfig | AdamConfig, theirs: dict[str, Any]) -> None:
    start = torch.linspace(-1, 1, 7)
    ours, parameter = ServerOptimizer(config, start), start.clone()
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.SGD
    reference = kind([parameter], **theirs)
    for number, gradient in enumerate(gradients(20)):
        reference.param_groups[0]["lr"] = config.rate(number, 20) * config.learning_rate
        parameter.grad = gradient
        reference.step()
        assert torch.equal(ours.step(gradient, config.rate(number, 20)), parameter)


def test_a_step_does_not_import_pytorchs_compiler() -> None:
    code = (
        "import sys, torch; from fedsim.learning.server_optimizers import AdamConfig, ServerOptimizer; "
        "ServerOptimizer(AdamConfig(), torch.ones(2)).step(torch.ones(2)); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{getattr(c, 'momentum', '')}")
def test_a_restored_optimizer_goes_on_to_the_bit(config: SgdConfig | AdamConfig | YogiConfig) -> None:
    through = ServerOptimizer(config, torch.zeros(7))
    for gradient in gradients(3):
        through.step(gradient)
    state = {name: tensor.clone() for name, tensor in through.state_dict().items()}
    restored = ServerOptimizer(config, torch.zeros(7))
    restored.load_state_dict(state)
    for gradient in gradients(2):
        assert torch.equal(through.step(gradient), restored.step(gradient))


def test_the_rate_warms_up_and_decays() -> None:
    schedule = SgdConfig(warmup_rounds=4, decay_rounds=2)
    rates = [schedule.rate(r, 8) for r in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0])
    assert SgdConfig().rate(5, 8) == 1.0


def test_a_smaller_rate_scales_the_step() -> None:
    step = gradients(1)[0]
    full = ServerOptimizer(AdamConfig(), torch.zeros(7)).step(step)
    half = ServerOptimizer(AdamConfig(), torch.zeros(7)).step(step, rate=0.5)
    assert torch.allclose(full, 2 * half)
