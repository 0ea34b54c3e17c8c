"""`fedsim attack` with attacks that learn from public images first."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.cli import run
from fedsim.data.datasets import DigitsConfig, load_dataset
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.payload_attack import attack_payload, check_payload
from fedsim.payload_config import parse_payload_config
from tests.attacks.problems import smooth_images
from tests.test_cli import fails
from tests.test_payload_attack import LENET, payload


def saved_payload(path: Path, images: Tensor, labels: Tensor) -> Path:
    """Save a LeNet, its gradient of images [B, 1, 28, 28] with labels [B], and the truth; return the path."""
    model = build_model(LeNetConfig(), (1, 28, 28), 10, seed=0).module
    F.cross_entropy(model(images), labels).backward()
    gradient = {name: value.grad.clone() for name, value in model.named_parameters()}
    torch.save({"weights": model.state_dict(), "gradient": gradient, "labels": labels, "images": images}, path)
    return path


def test_an_inverter_learns_from_a_named_data_set_without_the_true_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load_dataset(DigitsConfig())
    x, y = torch.from_numpy(digits.train_images[:1].copy()) / 255, torch.from_numpy(digits.train_labels[:1].copy())
    path = saved_payload(tmp_path / "digit.pt", x, y)
    small = {"name": "inverter", "public": "digits", "images": 200, "steps": 20, "width": 16, "components": 20}
    checked = check_payload(parse_payload_config({"shape": list(digits.shape), "attack": small}), path)
    assert checked.public is not None and len(checked.public.labels) == 1796
    assert not (checked.public.images == (x * 255).to(torch.uint8)).flatten(1).all(1).any()
    once, again = attack_payload(checked), attack_payload(checked)
    assert torch.equal(once.found.images, again.found.images) and once.images["PSNR"].notna().all()
    command = ["attack", str(path), "--model", "lenet", "--shape", "1x28x28", "--attack", "inverter"]
    assert "attack.public: a payload has no test images" in fails(command, capsys)
    wrong = ["attack", str(payload(tmp_path / "one.pt")), *LENET, "--attack", "inverter", "attack.public=digits"]
    assert "public: digits has images of [1, 28, 28], the model takes [1, 12, 12]" in fails(wrong, capsys)


def test_a_generative_prior_says_how_far_it_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved_payload(tmp_path / "one.pt", smooth_images(1, (1, 28, 28)), torch.tensor([3]))
    command = ["attack", str(path), "--model", "lenet", "--shape", "1x28x28", "--attack", "generative"]
    assert "attack.public: a payload has no test images" in fails(command, capsys)
    small = ["latents=4", "width=16", "steps=10", "images=100", "iterations=5", "refine_iterations=5"]
    command += ["attack.public=digits", *(f"attack.{setting}" for setting in small), "--output", str(tmp_path)]
    assert run(command) == 0
    assert "90 public images; 10 held out are" in capsys.readouterr().out
    saved = json.loads((tmp_path / "attack" / "result.json").read_text())
    assert "dB from its nearest" in saved["learned"] and saved["images"][0]["iterations"] == 10
    wrong = [
        "attack",
        str(payload(tmp_path / "small.pt")),
        *LENET,
        "--attack",
        "generative",
        "attack.public=digits",
    ]
    assert "public: digits has images of [1, 28, 28], the model takes [1, 12, 12]" in fails(wrong, capsys)


@pytest.mark.parametrize(("count", "allowed"), [(10, True), (11, False)])
def test_a_public_set_too_small_for_the_batch_is_refused(
    count: int, allowed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 20 public images one batch is learned from and one held out: batches of 10, and no more."""
    shape = (1, 28, 28)
    model = build_model(LeNetConfig(), shape, 10, seed=0).module
    path = tmp_path / "batch.pt"
    gradient = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    torch.save({"weights": model.state_dict(), "gradient": gradient, "labels": torch.arange(count) % 10}, path)
    command = ["attack", str(path), "--model", "lenet", "--shape", "1x28x28", "--attack", "inverter"]
    command += ["attack.public=digits", "attack.images=20", "--output", str(tmp_path / "out"), "--dry-run"]
    if allowed:
        assert run(command) == 0
    else:
        expected = "20 public images are too few to learn from for gradients of 11 image(s)"
        assert expected in fails(command[:-1], capsys)
    assert not (tmp_path / "out").exists()


def test_a_weight_is_chosen_on_public_images_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved_payload(tmp_path / "one.pt", smooth_images(1, (1, 28, 28)), torch.tensor([3]))
    command = ["attack", str(path), "--model", "lenet", "--shape", "1x28x28", "--attack", "gia"]
    command += ["attack.iterations=20", "--output", str(tmp_path)]
    tuned = [*command, "attack.tv=[3, 3000]", "attack.tuning_victims=2"]
    assert "attack.public: a payload has no test images" in fails(tuned, capsys)
    assert run([*tuned, "attack.public=digits"]) == 0
    assert "tv 3 chosen on 2 public victims (3: " in capsys.readouterr().out
    saved = json.loads((tmp_path / "attack" / "result.json").read_text())
    assert saved["learned"].startswith("tv 3 chosen")
    assert run([*command, "attack.tv=3", "name=given"]) == 0
    given = json.loads((tmp_path / "given" / "result.json").read_text())
    for figure in ("PSNR", "loss", "loss_at_truth"):
        assert saved["images"][0][figure] == given["images"][0][figure], "it is the attack with that weight"
    few = fails([*command, "attack.tv=[3, 3000]", "attack.public=digits", "attack.tuning_victims=1798"], capsys)
    assert "gia: 1797 public images are too few to tune `tv` on" in few
    assert "several weights to choose from are two or more" in fails([*command, "attack.tv=[3]"], capsys)
