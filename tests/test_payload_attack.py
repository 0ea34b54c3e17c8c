import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.cli import run
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.payload_attack import attack_payload, check_payload
from fedsim.payload_config import parse_payload_config
from tests.attacks.problems import smooth_images
from tests.test_cli import fails

SHAPE = (1, 12, 12)
LENET = ["--model", "lenet", "--shape", "1x12x12"]


def network(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """As a user's own: batch norm, and images that are normalised first."""
    side = shape[1] * shape[2]
    layers = nn.Conv2d(shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * side, classes))


def payload(path: Path, count: int = 1, model: nn.Module | None = None, **more: Any) -> Path:
    """Write weights, a gradient, labels and the truth as plain PyTorch has them."""
    model = model or build_model(LeNetConfig(), SHAPE, 10, seed=0).module
    x, y = smooth_images(count, SHAPE), torch.arange(count) % 10
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gradient = {name: value.grad.clone() for name, value in model.named_parameters()}
    content = {"weights": model.state_dict(), "gradient": gradient, "labels": y, "images": x} | more
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return payload(tmp_path / "one.pt")


def test_the_command_finds_the_image_scores_it_and_never_overwrites(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "out")]
    command = ["attack", str(one), *LENET, "--attack", "dlg", "name=mine", *out]
    assert run([*command, "--dry-run"]) == 0
    assert "truth given" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert run(command) == 0
    assert "PSNR" in capsys.readouterr().out
    folder = tmp_path / "out" / "mine"
    table = pd.read_csv(folder / "images.csv")
    assert table["PSNR"].min() > 40 and table["recovered_label"].tolist() == [0]
    result = json.loads((folder / "result.json").read_text())
    assert result["images"][0]["loss_at_truth"] < 1e-8 and result["config"]["attack"]["name"] == "dlg"
    assert Image.open(folder / "reconstructions.png").size == (3 * 14, 3 * 28)
    with np.load(folder / "reconstructions.npz") as arrays:
        assert arrays["images"].shape == (1, *SHAPE)
    written = (folder / "result.json").stat().st_mtime_ns
    assert "holds this attack already" in fails(command, capsys)
    assert "holds another attack" in fails([*command, "seed=1", "--resume"], capsys)
    assert run([*command, "--resume"]) == 0
    assert (folder / "result.json").stat().st_mtime_ns == written


def test_an_interrupted_attack_is_run_again(one: Path, tmp_path: Path) -> None:
    command = ["attack", str(one), *LENET, "--attack", "dlg", "attack.iterations=3", "--output", str(tmp_path)]
    assert run(command) == 0
    (tmp_path / "attack" / "result.json").unlink()
    assert run([*command, "--resume"]) == 0
    assert (tmp_path / "attack" / "result.json").exists()


def test_without_the_truth_there_are_no_scores(tmp_path: Path) -> None:
    path = payload(tmp_path / "p.pt", count=2, images=None)
    assert run(["attack", str(path), *LENET, "attack.iterations=5", "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "attack" / "images.csv")
    assert "PSNR" not in table and len(table) == 2 and table["loss"].notna().all()


def test_the_truth_does_not_change_what_is_found(tmp_path: Path) -> None:
    config = parse_payload_config({"shape": SHAPE, "attack": {"name": "gia", "iterations": 20}})
    told = check_payload(config, payload(tmp_path / "told.pt", 2))
    blind = check_payload(config, payload(tmp_path / "blind.pt", 2, images=None))
    assert told.truth is not None and blind.truth is None
    assert torch.equal(attack_payload(told).found.images, attack_payload(blind).found.images)


def update_of(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for images, labels in zip(x.chunk(steps), y.chunk(steps), strict=True):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()


def test_two_rounds_of_plain_pytorch_with_two_local_steps(tmp_path: Path) -> None:
    model = build_model(LeNetConfig(init="uniform"), SHAPE, 10, seed=0).module
    x, y = smooth_images(2, SHAPE), torch.tensor([3, 7])
    torch.save(model.state_dict(), tmp_path / "before.pt")
    update_of(model, x, y, steps=2, rate=0.1)
    np.savez(tmp_path / "after.npz", *[value.numpy() for value in model.state_dict().values()])
    torch.save({"images": x}, tmp_path / "truth.pt")
    config = parse_payload_config(
        {
            "shape": SHAPE,
            "local_steps": 2,
            "learning_rate": 0.1,
            "labels": [3, 7],
            "batch_size": 2,
            "attack": {"name": "dlg", "labels": "known", "iterations": 150, "precision": "float32"},
        }
    )
    checked = check_payload(config, tmp_path / "before.pt", tmp_path / "after.npz", tmp_path / "truth.pt")
    found = attack_payload(checked).images
    assert found["loss_at_truth"].max() < 1e-6 and found["PSNR"].min() > 25


def test_a_normalised_input_and_batch_norms_own_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network(SHAPE, 10).train()
    x, y = smooth_images(2, SHAPE), torch.tensor([3, 7])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update_of(model, (x - 0.3) / 0.2, y, steps=1, rate=0.05)
    torch.save(before, tmp_path / "before.pt")
    torch.save(model.state_dict(), tmp_path / "after.pt")
    torch.save({"images": x, "labels": y}, tmp_path / "truth.pt")
    config = parse_payload_config(
        {
            "model": {"name": "custom", "factory": "tests.test_payload_attack:network"},
            "shape": SHAPE,
            "mean": [0.3],
            "std": [0.2],
            "learning_rate": 0.05,
            "labels": [3, 7],
            "attack": {"name": "dlg", "labels": "known"},
        }
    )
    checked = check_payload(config, tmp_path / "before.pt", tmp_path / "after.pt", tmp_path / "truth.pt")
    assert checked.truth is not None
    loss = checked.attack.matching_loss(checked.observation, checked.truth.images, checked.truth.labels)
    assert loss is not None and float(loss) < 1e-6
    _, seen = checked.observation.model.logits_and_statistics(checked.observation.weights, x)
    torch.testing.assert_close(checked.observation.statistics[0], seen, rtol=1e-3, atol=1e-3)


def test_batch_norm_in_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network(SHAPE, 10).train()
    model(smooth_images(8, SHAPE))
    path = payload(tmp_path / "p.pt", count=2, model=model.eval())
    described = {"model": {"name": "custom", "factory": "tests.test_payload_attack:network"}, "shape": SHAPE}
    losses = []
    for mode in ("eval", "train"):
        checked = check_payload(parse_payload_config(described | {"batch_norm": mode}), path)
        assert checked.truth is not None
        loss = checked.attack.matching_loss(checked.observation, checked.truth.images, checked.truth.labels)
        losses.append(float(loss))  # type: ignore[arg-type]
    assert losses[0] < 1e-6 < losses[1]


def broken_gradient() -> dict[str, Tensor]:
    model = build_model(LeNetConfig(), SHAPE, 10, seed=0)
    gradient = {name: torch.zeros_like(value) for name, value in model.module.named_parameters()}
    gradient["fc.weight"][0, 0] = torch.nan
    return gradient


@pytest.mark.parametrize(
    ("content", "arguments", "fragment"),
    [
        ({}, ["--shape", "1x28x28"], "fc.weight is [10, 108] there, [10, 588] in the model"),
        ({}, ["--model", "convnet64", "--shape", "1x12x12"], "do not fit the model"),
        ({"gradient": broken_gradient()}, LENET, "not finite, the first in fc.weight"),
        ({"batch_size": 1}, [*LENET, "batch_size=4"], "batch_size: 4 images, but the payload says 1"),
        ({}, [*LENET, "batch_size=4"], "labels: 1 labels for a batch of 4"),
        ({"labels": None}, LENET, "labels: gia assumes that they are known"),
        ({"labels": torch.tensor([10])}, LENET, "labels: [10] are not all classes between 0 and 9"),
        ({"images": torch.rand(3, *SHAPE)}, LENET, "3 true images for a batch of 1"),
        ({}, [*LENET, "local_steps=2", "learning_rate=0.1"], "cannot be shared evenly by 2 local steps"),
        ({"count": 2}, [*LENET, "local_steps=2"], "learning_rate: several local steps"),
        ({}, [*LENET, "--attack", "gradinversion"], "batch-norm statistics, but the model has none"),
        ({}, [*LENET, "--attack", "analytic"], "analytic needs a model that starts with a fully connected layer"),
        ({"count": 2}, [*LENET, "--attack", "r_gap"], "r_gap inverts single images"),
        ({}, [*LENET, "--attack", "r_gap", "mean=[0.5]"], "r_gap needs a plain chain"),
        ({}, [*LENET, "range=[1, 0]"], "range"),
        ({}, [*LENET, "mean=[0, 0]"], "mean: one number, or one for each of the 1 channels"),
        ({}, [*LENET, "attack.nmae=gia"], "did you mean 'name'"),
        ({}, [*LENET, "--attack", "gai"], "did you mean 'gia'"),
        ({}, ["--model", "lenet", "--shape", "12x12"], "--shape: '12x12' must be channels, height and width"),
        ({}, [*LENET, "--truth", "nowhere.pt"], "nowhere.pt: cannot be read"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(
    content: dict[str, Any],
    arguments: list[str],
    fragment: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = payload(tmp_path / "p.pt", **content)
    assert fragment in fails(["attack", str(path), *arguments, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_two_rounds_without_an_update_between_them_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(LeNetConfig(), SHAPE, 10, seed=0).module
    torch.save(model.state_dict(), tmp_path / "same.pt")
    command = ["attack", str(tmp_path / "same.pt"), "--after", str(tmp_path / "same.pt"), *LENET, "labels=[1]"]
    assert "holds no update" in fails([*command, "learning_rate=0.1"], capsys)


def test_a_learning_rate_that_is_left_out_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model(LeNetConfig(init="uniform"), SHAPE, 10, seed=0).module
    x, y = smooth_images(2, SHAPE), torch.tensor([3, 7])
    torch.save(model.state_dict(), tmp_path / "before.pt")
    update_of(model, x, y, steps=2, rate=0.1)
    torch.save(model.state_dict(), tmp_path / "after.pt")
    command = ["attack", str(tmp_path / "before.pt"), "--after", str(tmp_path / "after.pt"), *LENET]
    command += ["local_steps=2", "labels=[3, 7]", "--output", str(tmp_path)]
    assert run([*command, "attack.iterations=50"]) == 0
    assert "learning rate not known" in capsys.readouterr().out
    rates = pd.read_csv(tmp_path / "attack" / "images.csv")["learning_rate"]
    assert rates.tolist() == pytest.approx([0.1, 0.1], rel=1e-2)
    assert "soft labels and an unknown learning rate" in fails([*command, "name=b", "--attack", "dlg"], capsys)
