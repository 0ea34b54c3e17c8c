from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.models import LeNetConfig, Model, build_model
from fedsim.privacy.payload_files import align, batch_statistics, read_payload, read_tensors, truth_images

SHAPE = (1, 12, 12)


def lenet() -> Model:
    return build_model(LeNetConfig(), SHAPE, 10, seed=0)


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 144, 10)
    return nn.Sequential(*layers)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def test_every_format_gives_the_same_vectors(tmp_path: Path) -> None:
    model = lenet()
    weights = state(model)
    gradient = {name: torch.randn_like(value) for name, value in weights.items()}
    torch.save({"weights": weights, "gradient": list(gradient.values())}, tmp_path / "a.pt")
    flat = {f"weights.{k}": v for k, v in weights.items()} | {f"gradient.{k}": v for k, v in gradient.items()}
    save_file(flat, tmp_path / "b.safetensors", metadata={"batch_size": "3"})
    np.savez(tmp_path / "c.npz", **{name: value.numpy() for name, value in flat.items()})
    expected = torch.cat([value.flatten() for value in gradient.values()])
    for name in ("a.pt", "b.safetensors", "c.npz"):
        payload = read_payload(tmp_path / name)
        assert payload.kind == "gradient"
        assert torch.equal(align(payload.section("weights"), model, "w").parameters, model.initial_weights())
        assert torch.equal(align(payload.section("gradient"), model, "g").parameters, expected)
    assert read_payload(tmp_path / "b.safetensors").value("batch_size") == 3


def test_two_rounds_as_state_dicts_and_as_lists_of_arrays(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in normed().state_dict().items()}
    later = {name: value + 1 for name, value in before.items()}
    model = Model(normed(), SHAPE, 10)
    for suffix, write in (
        ("pt", lambda path, s: torch.save(s, path)),
        ("npz", lambda path, s: np.savez(path, *[value.numpy() for value in s.values()])),
    ):
        first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
        write(first, before)
        write(second, later)
        payload = read_payload(first, second)
        assert payload.kind == "after"
        here, there = (align(payload.section(name), model, name) for name in ("weights", "after"))
        torch.testing.assert_close(there.parameters, here.parameters + 1)
        assert here.averages is not None and there.averages is not None
        assert torch.equal(here.averages, torch.tensor([0.0] * 4 + [1.0] * 4))
        torch.testing.assert_close(there.averages, here.averages + 1)


def test_data_parallel_names_are_understood() -> None:
    model = lenet()
    wrapped = {f"module.{name}": value for name, value in state(model).items()}
    assert torch.equal(align(wrapped, model, "w").parameters, model.initial_weights())


def test_the_batch_statistics_follow_from_two_averages() -> None:
    images = torch.rand(6, *SHAPE)
    theirs = normed().train()
    first = theirs[1].running_mean.clone(), theirs[1].running_var.clone()
    theirs(images)
    before, after = torch.cat(first), torch.cat([theirs[1].running_mean, theirs[1].running_var])
    model = Model(normed(), SHAPE, 10)
    model.module.train()
    model.module(images)
    seen = batch_norm.collect_statistics(batch_norm.layers(model.module), images)
    found = batch_statistics(before, after, model, batch_size=6, momentum=0.1)
    torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-5)


def test_a_payload_of_another_model_is_refused_with_names_and_shapes() -> None:
    model = lenet()
    other = state(build_model(LeNetConfig(), (1, 28, 28), 10, seed=0))
    with pytest.raises(ConfigError, match=r"fc.weight is \[10, 588\] there, \[10, 108\] in the model"):
        align(other, model, "the weights")
    with pytest.raises(
        ConfigError, match=r"there 0.weight, 0.bias, 1.weight and 5 more; in the model body.0.weight"
    ):
        align({n: v for n, v in Model(normed(), SHAPE, 10).module.state_dict().items()}, model, "the weights")
    with pytest.raises(ConfigError, match="2 arrays there, 8 parameters in the model"):
        align({"0": torch.zeros(1), "1": torch.zeros(1)}, model, "the weights")
    lacking = state(model)
    lacking.pop("fc.bias")
    with pytest.raises(ConfigError, match="in the model fc.bias"):
        align(lacking, model, "the weights")


def test_values_that_are_not_finite_are_refused() -> None:
    model = lenet()
    broken = state(model)
    broken["fc.bias"][3] = torch.nan
    with pytest.raises(ConfigError, match="not finite, the first in fc.bias"):
        align(broken, model, "the gradient")


def test_files_that_are_no_payload_get_one_line(tmp_path: Path) -> None:
    text, weights = tmp_path / "text.pt", tmp_path / "weights.pt"
    text.write_text("not a tensor")
    torch.save(state(lenet()), weights)
    torch.save({"weights": {"a": "text"}}, tmp_path / "string.pt")
    torch.save({"weights": {"a": torch.zeros(1)}, "gradient": [torch.zeros(1)], "update": [torch.zeros(1)]},
               tmp_path / "two.pt")  # fmt: skip
    torch.save({"gradient": [torch.zeros(1)]}, tmp_path / "alone.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    for name, message in (
        ("missing.pt", "cannot be read: No such file"),
        ("text.pt", "not a file of tensors alone"),
        ("broken.safetensors", "not a file of tensors alone"),
        ("string.pt", "weights.a is no tensor but str"),
        ("weights.pt", "holds weights; a payload needs weights and one of gradient, update and after"),
        ("two.pt", "holds gradient and update"),
        ("alone.pt", "holds gradient, but no weights"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            read_payload(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    torch.save({"weights": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ConfigError, match="not a file of tensors alone"):
        read_tensors(tmp_path / "harmful.pt")


def test_true_images_are_brought_to_the_unit_range() -> None:
    as_bytes = torch.full((2, *SHAPE), 51, dtype=torch.uint8)
    assert torch.allclose(truth_images(as_bytes, SHAPE, 0, 1, "t"), torch.tensor(0.2))
    assert torch.allclose(truth_images(torch.zeros(SHAPE), SHAPE, -1, 1, "t"), torch.tensor(0.5))
    with pytest.raises(ConfigError, match="outside the range 0 to 1"):
        truth_images(torch.full(SHAPE, 2.0), SHAPE, 0, 1, "t")
    with pytest.raises(ConfigError, match=r"expected \[B, 1, 12, 12\]"):
        truth_images(torch.zeros(2, 3, 12, 12), SHAPE, 0, 1, "t")
