import pytest
import torch
from torch import nn

from fedsim.learning.layout import ParameterLayout

MODULE = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


def test_offsets_follow_parameter_order() -> None:
    layout = ParameterLayout.of(MODULE)
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.offsets == (0, 18, 20, 44, 47)
    assert layout.dimension == sum(p.numel() for p in MODULE.parameters())


def test_views_share_storage_and_undo_flatten() -> None:
    layout = ParameterLayout.of(MODULE)
    flat = layout.flatten(p.detach() for p in MODULE.parameters()).clone()
    for name, parameter in MODULE.named_parameters():
        assert torch.equal(layout.views(flat)[name], parameter)
    layout.views(flat)["0.bias"].fill_(7.0)
    assert (flat[layout.span("0.bias")] == 7.0).all()


def test_views_of_a_matrix_keep_the_leading_dimension() -> None:
    layout = ParameterLayout.of(MODULE)
    rows = torch.arange(3 * layout.dimension, dtype=torch.float32).reshape(3, -1)
    views = layout.views(rows)
    assert views["0.weight"].shape == (3, 2, 1, 3, 3)
    assert torch.equal(layout.flatten([v[1] for v in views.values()]), rows[1])


def test_a_parameter_may_be_a_single_number() -> None:
    layout = ParameterLayout(("weight", "scale"), ((2,), ()))
    assert layout.views(torch.arange(3.0))["scale"].item() == 2.0
    assert layout.views(torch.arange(6.0).reshape(2, 3))["scale"].tolist() == [2.0, 5.0]


def test_unknown_parameter_lists_the_valid_ones() -> None:
    with pytest.raises(KeyError, match="0.weight"):
        ParameterLayout.of(MODULE).span("fc.weight")
