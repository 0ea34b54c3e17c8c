import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.learning import fused
from fedsim.learning.batches import ImageStore
from fedsim.learning.fused import (
    FusedTrainer,
    check_fusable,
    shuffle_pixels,
    sub_pixel_filters,
    sub_pixel_reach,
)
from fedsim.learning.models import ConvNet64Config, MLPConfig, Model, build_model

SHAPE = (2, 6, 5)


def store(images: int = 40) -> ImageStore:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, *SHAPE), dtype=np.uint8)
    return ImageStore.of(pixels, rng.integers(0, 3, images), "cpu")


class Grouped(nn.Module):
    """Dilation, groups, no bias, a layer that is used twice, and one whose stride leaves a pixel out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 2, 5, padding=2, stride=2)
        self.last = nn.Linear(2 * 3 * 3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.relu(self.twice(self.first(x)))))
        return self.last(self.strided(x).flatten(1))


def models() -> list[Model]:
    torch.manual_seed(0)
    return [Model(Grouped(), SHAPE, 3), build_model(MLPConfig(hidden=(7,)), SHAPE, 3, seed=0)]


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(0, 1),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    images=st.integers(1, 20),
    memory_format=st.sampled_from(["contiguous", "channels_last"]),
)
def test_each_client_gets_the_gradient_of_its_own_batch(
    number: int, sizes: list[int], images: int, memory_format: str
) -> None:
    model, data = models()[number], store()
    weights = model.initial_weights()
    rng = np.random.default_rng(len(sizes))
    schedules = [[rng.choice(40, size, replace=False)] for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "IMAGES", images)
        result = FusedTrainer(model, data, 0.1, memory_format).train(weights, schedules)  # type: ignore[arg-type]
    for row, loss, (batch,) in zip(result.updates, result.losses, schedules, strict=True):
        x, y = data.take(batch)
        at = weights.clone().requires_grad_()
        expected = F.cross_entropy(model.logits(at, x), y)
        (gradient,) = torch.autograd.grad(expected, at)
        assert torch.allclose(row, gradient, atol=1e-6)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    stride=st.integers(1, 4),
    padding=st.integers(0, 4),
    more=st.integers(0, 3),
    extents=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_shuffled_pixels_are_the_gradient_by_the_input(
    stride: int, padding: int, more: int, extents: tuple[int, int], channels: tuple[int, int]
) -> None:
    touched = -(-padding // stride)
    # Every size at which both sides reach equally far and the output has one pixel for each stride of the input.
    size = touched * stride + padding + 1 + more % (padding + stride - touched * stride)
    layer = nn.Conv2d(*channels, size, stride, padding)
    reach = sub_pixel_reach(layer)
    assert reach == touched
    x = torch.zeros(2, channels[0], stride * extents[0], stride * extents[1], requires_grad=True)
    y = layer(x)
    assert y.shape[2:] == extents
    slope = torch.randn(y.shape)
    (expected,) = torch.autograd.grad(y, x, slope)
    filters = sub_pixel_filters(layer.weight.detach(), stride, padding, reach)
    assert torch.allclose(shuffle_pixels(F.conv2d(slope, filters, padding=reach), stride), expected, atol=1e-5)


@given(
    stride=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_pixels_are_shuffled_as_by_pytorch_but_for_the_order_of_channels(
    stride: int, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    count, channels, height, width = shape
    images = torch.randn(count, channels, stride**2, height, width)
    ours = images.transpose(1, 2).flatten(1, 2).contiguous(memory_format=layout)
    assert torch.equal(shuffle_pixels(ours, stride), F.pixel_shuffle(images.flatten(1, 2), stride))


def test_only_convolutions_that_reach_as_far_to_each_side_have_sub_pixel_filters() -> None:
    assert sub_pixel_reach(nn.Conv2d(1, 1, 5, stride=2, padding=2)) == 1
    assert sub_pixel_reach(nn.Conv2d(1, 1, 5, padding=2)) == 2
    for other in (
        nn.Conv2d(1, 1, 3, stride=2, padding=1),
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(1, 1, 3, padding=1, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
        nn.Conv2d(1, 1, (5, 3), padding=(2, 1)),
        nn.Conv2d(1, 1, 5, stride=(2, 1), padding=2),
    ):
        assert sub_pixel_reach(other) is None


def test_what_couples_images_or_is_no_plain_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="fused needs linear layers and plain convolutions, not bn0.weight"):
        check_fusable(build_model(ConvNet64Config(), (3, 32, 32), 10, seed=0))
    reflecting = nn.Sequential(
        nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(30, 3)
    )
    with pytest.raises(ConfigError, match="0.weight"):
        check_fusable(Model(reflecting, SHAPE, 3))
    tied = nn.Sequential(nn.Flatten(), nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 3))
    tied[2].weight = tied[1].weight
    with pytest.raises(ConfigError, match="2.weight"):
        check_fusable(Model(tied, SHAPE, 3))
