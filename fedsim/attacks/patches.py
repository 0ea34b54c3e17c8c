"""Layers as matrix products over rows cut out of channels-last images; used by `chain`."""

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Cutter(Protocol):
    """How a layer turns images [N, H, W, C] (or vectors [N, F]) into rows, and its transpose likewise.

    Weights come with a leading dimension m: one a problem, or one for all.

    Attributes:
        input_shape: Shape of one input, channels last.
        output_shape: Shape of one output, channels last.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def order(self, weight: Tensor) -> Tensor:
        """Bring weights [m, *weight shape] into the order of the rows, [m, O, K]."""
        ...

    def restore(self, ordered: Tensor) -> Tensor:
        """Undo `order`, flat: [m, O, K] → [m, O·K]."""
        ...

    def transposed(self, weight: Tensor) -> Tensor:
        """Arrange weights [m, *weight shape] as the matrix of the transposed layer, [m, K′, C′]."""
        ...

    def cut(self, x: Tensor) -> Tensor:
        """Cut inputs into rows [N, P, K]: output = rows · weightᵀ."""
        ...

    def cut_back(self, delta: Tensor) -> Tensor:
        """Cut output-shaped values into rows [N, P′, K′] for the transposed layer."""
        ...

    def assemble(self, rows: Tensor) -> Tensor:
        """Put the transposed layer's rows [N, P′, C′] together to input-shaped values."""
        ...


class LinearRows:
    """A fully connected layer: one row an image."""

    def __init__(self, layer: nn.Linear, shape: tuple[int, ...]) -> None:
        """Take inputs of `shape`, channels last."""
        self.input_shape = shape
        self.output_shape: tuple[int, ...] = (layer.out_features,)

    def order(self, weight: Tensor) -> Tensor:
        """Bring columns from the order that flattening [C, H, W] gives into that of [H, W, C]."""
        if len(self.input_shape) == 1:
            return weight
        height, width, channels = self.input_shape
        planes = weight.reshape(*weight.shape[:2], channels, height, width)
        return planes.permute(0, 1, 3, 4, 2).flatten(2)

    def restore(self, ordered: Tensor) -> Tensor:
        """Bring columns back into the order of [C, H, W]."""
        if len(self.input_shape) == 1:
            return ordered.flatten(1)
        places = ordered.view(*ordered.shape[:2], *self.input_shape)
        return places.permute(0, 1, 4, 2, 3).flatten(1)

    def transposed(self, weight: Tensor) -> Tensor:
        """As `order`: the transposed layer multiplies by the same matrix from the other side."""
        return self.order(weight)

    def cut(self, x: Tensor) -> Tensor:
        """Flatten each input into one row."""
        return x.reshape(x.shape[0], 1, -1)

    def cut_back(self, delta: Tensor) -> Tensor:
        """Take each output as one row."""
        return delta[:, None]

    def assemble(self, rows: Tensor) -> Tensor:
        """Give the rows the shape of the input."""
        return rows.reshape(-1, *self.input_shape)


class ConvolutionRows:
    """A convolution with square kernel, stride s and zero padding p: one row an output position.

    Input pixel i lies at padded position i + p = q·s + r. Its share of the transposed convolution is
    Σⱼ δ[q − j]·w[j·s + r], a plain correlation for each of the s phases r (in both directions), with at most
    ⌈k/s⌉ taps j. So the transpose, too, only reads patches; nothing is scattered.
    """

    def __init__(self, layer: nn.Conv2d, shape: tuple[int, ...]) -> None:
        """Take inputs of `shape` [H, W, C]."""
        self.input_shape = shape
        self.side, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        out = [(n + 2 * self.padding - self.side) // self.stride + 1 for n in shape[:2]]
        self.output_shape: tuple[int, ...] = (*out, layer.out_channels)
        self.taps = -(-self.side // self.stride)
        first = self.padding // self.stride
        lasts = [(n - 1 + self.padding) // self.stride for n in shape[:2]]
        self.steps = [last - first + 1 for last in lasts]
        self.skip = self.padding - first * self.stride
        before = self.taps - 1 - first
        down, right = (last - size + 1 for last, size in zip(lasts, out, strict=True))
        self.back_padding = (0, 0, before, right, before, down)

    def order(self, weight: Tensor) -> Tensor:
        """Bring [m, O, C, k, k] into the order of a channels-last patch."""
        return weight.permute(0, 1, 3, 4, 2).flatten(2)

    def restore(self, ordered: Tensor) -> Tensor:
        """Bring patch order back into [O, C, k, k], flat."""
        places = ordered.view(*ordered.shape[:2], self.side, self.side, -1)
        return places.permute(0, 1, 4, 2, 3).flatten(1)

    def transposed(self, weight: Tensor) -> Tensor:
        """Arrange [m, O, C, k, k] as [m, taps·taps·O, s·s·C], with zeros where a phase lacks a tap."""
        many, out, channels = weight.shape[:3]
        missing = self.taps * self.stride - self.side
        padded = F.pad(weight.permute(0, 3, 4, 1, 2), (0, 0, 0, 0, 0, missing, 0, missing))
        split = padded.reshape(many, self.taps, self.stride, self.taps, self.stride, out, channels)
        phases = split.permute(0, 1, 3, 5, 2, 4, 6).reshape(many, self.taps**2, -1)
        # A patch meets its taps last to first; flipping whole rows is many times faster than single taps.
        return phases.flip(1).reshape(many, self.taps**2 * out, -1)

    def cut(self, x: Tensor) -> Tensor:
        """Cut the padded images into patches of the kernel's size."""
        p = self.padding
        return _patches(F.pad(x, (0, 0, p, p, p, p)), self.side, self.stride)

    def cut_back(self, delta: Tensor) -> Tensor:
        """Cut the padded outputs into patches of `taps` × `taps`."""
        return _patches(F.pad(delta, self.back_padding), self.taps, 1)

    def assemble(self, rows: Tensor) -> Tensor:
        """Interleave the phases and crop what lies in the padding."""
        height, width, channels = self.input_shape
        s, (down, right) = self.stride, self.steps
        phases = rows.view(-1, down, right, s, s, channels).transpose(2, 3)
        whole = phases.reshape(-1, down * s, right * s, channels)
        return whole[:, self.skip : self.skip + height, self.skip : self.skip + width]


def _patches(x: Tensor, side: int, stride: int) -> Tensor:
    x = x.contiguous()
    count, height, width, channels = x.shape
    down, right = (height - side) // stride + 1, (width - side) // stride + 1
    row = width * channels
    strides = (height * row, stride * row, stride * channels, row, 1)
    patches = x.as_strided((count, down, right, side, side * channels), strides)
    return patches.reshape(count, down * right, side * side * channels)
