"""How fast the attacks are, against the plain loop that attacks one image after the other; prints JSON lines.

    .venv/bin/python benchmarks/attacks.py --problems 4 8 32 --model lenet --dataset synthetic

Every ratio is of two timings of this run, each the least of several turns taken one after the other in rotation;
`seconds` are CPU seconds of one thread, per image. Where there is a GPU, both sides run on it, and they are wall
seconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.distances import SquaredError
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIA, GIAConfig
from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.data.datasets import CIFAR10Config, load_dataset
from fedsim.learning.models import ConvNet64Config, LeNet4Config, LeNetConfig, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Observation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {"lenet": LeNetConfig, "lenet4": LeNet4Config, "convnet64": ConvNet64Config}


def images(dataset: str, count: int, data_dir: Path | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 test images, digits scaled to 28×28, or coarse random fields of 3×32×32; and labels."""
    if dataset == "cifar10":
        cifar = load_dataset(CIFAR10Config(), data_dir)
        order = torch.randperm(len(cifar.test_labels), generator=torch.Generator().manual_seed(0))[:count].numpy()
        return torch.tensor(cifar.test_images[order]) / 255, torch.tensor(cifar.test_labels[order])
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        small = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None] / 16
        return F.interpolate(small, size=(28, 28), mode="bilinear"), torch.tensor(digits.target[:count])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1), labels


def observe(
    model_name: str, init: str, dataset: str, count: int, data_dir: Path | None = None
) -> tuple[Tensor, Observation]:
    truth, labels = images(dataset, count, data_dir)
    model = build_model(MODELS[model_name](init=init), tuple(truth.shape[1:]), 10, seed=0).to(DEVICE)
    weights = model.initial_weights().to(DEVICE).requires_grad_()
    truth, labels = truth.to(DEVICE), labels.to(DEVICE)
    losses = (F.cross_entropy(model.logits(weights, x[None]), y[None]) for x, y in zip(truth, labels, strict=True))
    gradients = torch.stack([torch.autograd.grad(loss, weights)[0] for loss in losses])
    seeds = tuple(range(count))
    empty = gradients.new_zeros(count, 0)
    observation = Observation(model, weights.detach(), gradients, 1, empty, labels[:, None], seeds)
    return truth[:, None], observation


def plain_gradient(observation: Observation, victim: int, x: Tensor, p: Tensor) -> list[Tensor]:
    """The gradient of one dummy as published code makes it: by the module itself, ready for another derivative."""
    logits = observation.model.module(x)
    loss = -(p * logits.log_softmax(-1)).sum(-1).mean()
    return list(torch.autograd.grad(loss, list(observation.model.module.parameters()), create_graph=True))


def plain_dlg(observation: Observation, victim: int, steps: int) -> Tensor:
    """DLG by torch's L-BFGS with strong Wolfe search and scaled loss; return the image."""
    generator = torch.Generator().manual_seed(victim)
    noise = torch.randn(1, *observation.model.shape, generator=generator), torch.randn(1, 10, generator=generator)
    x, label = (start.to(DEVICE).requires_grad_() for start in (0.5 + 0.1 * noise[0], 0.1 * noise[1]))
    target = observation.model.layout.views(observation.gradients[victim])
    scale = 1e8 / observation.gradients[victim].square().sum()
    optimiser = torch.optim.LBFGS([x, label], 1, steps, 2 * steps, 0, 0, 50, "strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = plain_gradient(observation, victim, x, label.softmax(-1))
        error = sum((g - t).square().sum() for g, t in zip(found, target.values(), strict=True)) * scale
        x.grad, label.grad = torch.autograd.grad(error, (x, label))
        return error.detach()

    optimiser.step(closure)
    return x.detach()


def plain_gia(observation: Observation, victim: int, steps: int) -> None:
    """GIA on one image by torch's Adam."""
    start = torch.rand(1, *observation.model.shape, generator=torch.Generator().manual_seed(victim))
    x = start.to(DEVICE).requires_grad_()
    p = F.one_hot(observation.labels[victim], 10).float()
    target = list(observation.model.layout.views(observation.gradients[victim]).values())
    optimiser = torch.optim.Adam([x], 0.1)
    for _ in range(steps):
        found = plain_gradient(observation, victim, x, p)
        dot = sum((g * t).sum() for g, t in zip(found, target, strict=True))
        norms = [sum(v.square().sum() for v in vectors) for vectors in (found, target)]
        distance = 1 - dot / (norms[0] * norms[1]).sqrt()
        variation = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
        (x.grad,) = torch.autograd.grad(distance + 1e-6 * variation, x)
        x.grad.sign_()
        optimiser.step()
        x.data.clamp_(0, 1)


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def least(turns: int, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run the jobs in rotation and return the least seconds of each."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(turns):
        for name, job in jobs.items():
            began = clock()
            job()
            best[name] = min(best[name], clock() - began)
    return best


def evaluation(observation: Observation, turns: int) -> dict[str, object]:
    """One evaluation of the matching loss and its derivative by the image; plain ones of 32 at most."""
    count = observation.victims
    x = torch.rand(count, 1, *observation.model.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    p, everyone = torch.full((count, 1, 10), 0.1, device=DEVICE), torch.arange(count, device=DEVICE)
    fast = GradientMatching(observation, SquaredError)
    automatic = GradientMatching(observation, SquaredError)
    automatic.engine = Autodiff(observation.model, observation.weights)
    target = observation.model.layout.views(observation.gradients)
    few = range(min(count, 32))

    def plain() -> None:
        for victim in few:
            dummy = x[victim].clone().requires_grad_()
            found = plain_gradient(observation, victim, dummy, p[victim])
            error = sum((g - t[victim]).square().sum() for g, t in zip(found, target.values(), strict=True))
            torch.autograd.grad(error, dummy)

    jobs = {"fedsim": lambda: fast(x, p, everyone), "vmap": lambda: automatic(x, p, everyone), "plain": plain}
    seconds = least(turns, jobs)
    seconds["plain"] *= count / len(few)
    return {"engine": type(fast.engine).__name__} | report(seconds, count)


def gia(observation: Observation, turns: int, steps: int) -> dict[str, object]:
    """GIA's cost an iteration."""
    attack, count = GIA(GIAConfig(iterations=steps)), observation.victims
    few = range(min(count, 4))
    jobs = {
        "fedsim": lambda: attack.reconstruct(observation),
        "plain": lambda: [plain_gia(observation, victim, steps) for victim in few],
    }
    seconds = least(turns, jobs)
    seconds["plain"] *= count / len(few)
    return report({name: value / steps for name, value in seconds.items()}, count)


def dlg(truth: Tensor, observation: Observation) -> dict[str, object]:
    """DLG until it is done, and the plain loop for as many steps on the first two images."""
    began = clock()
    found = DLGConfig().build().reconstruct(observation)
    ours = clock() - began
    steps, few = int(found.iterations.float().mean()), min(2, observation.victims)
    began = clock()
    plain = torch.stack([plain_dlg(observation, victim, steps) for victim in range(few)])
    theirs = (clock() - began) * observation.victims / few
    both = found.images.cpu(), plain.cpu()
    recovered = [sum(row.PSNR > 30 for row in score(truth.cpu()[: len(x)], x)) for x in both]
    shares = {"recovered": recovered[0] / len(found.images), "recovered_plain": recovered[1] / few}
    return {"iterations": steps} | shares | report({"fedsim": ours, "plain": theirs}, observation.victims)


def report(seconds: dict[str, float], count: int) -> dict[str, object]:
    """Seconds an image, and how many times faster than the plain loop."""
    lines: dict[str, object] = {f"seconds_{name}": round(value / count, 6) for name, value in seconds.items()}
    lines |= {f"speedup_{n}": round(seconds["plain"] / v, 2) for n, v in seconds.items() if n != "plain"}
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--model", choices=sorted(MODELS), default="lenet")
    parser.add_argument("--init", choices=["default", "uniform"], default="default")
    parser.add_argument("--dataset", choices=["digits", "synthetic", "cifar10"], default="synthetic")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies, in torchvision's layout")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="GIA iterations timed in a turn")
    parser.add_argument("--only", choices=["evaluation", "gia", "dlg"], nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for count in arguments.problems:
        truth, observation = observe(arguments.model, arguments.init, arguments.dataset, count, arguments.data_dir)
        jobs: dict[str, Callable[[], dict[str, object]]] = {
            "evaluation": lambda o=observation: evaluation(o, arguments.turns),
            "gia": lambda o=observation: gia(o, arguments.turns, arguments.steps),
            "dlg": lambda o=observation, t=truth: dlg(t, o),
        }
        for name in arguments.only or jobs:
            head = {"benchmark": name, "model": arguments.model, "init": arguments.init}
            head |= {"dataset": arguments.dataset, "problems": count}
            print(json.dumps(head | jobs[name]()), flush=True)


if __name__ == "__main__":
    main()
