"""The network rewritten for inference: the same numbers, up to float rounding, from fewer operations.

- Batch norms are folded into the convolutions before them.
- The first block ends in a 1x1 convolution without an activation, and both of its readers begin with one: each pair is
  one matrix. That saves a tenth of the whole network's arithmetic, at the size where memory traffic costs most.
- A face comes as RGB in 0..255: colour order and scale live in the first and last weights.
- The last step up may work on row strips: its widest features, 26 MB for a whole face, then stay in a CPU's caches.
- What depends on the video frame alone (the encoder) is apart from what depends on the audio too, so that a runtime may
  keep the encoder's deeper levels for each frame instead of computing them again.

The flow is written once, over a small set of operations (`Ops`): torch executes them, OpenVINO builds a graph of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lipsync.engine.geometry import GEOMETRIES, FaceGeometry
from lipsync.engine.unet import AUDIO_GRID, DoubleConv, InvertedResidual, UNet

Value = TypeVar("Value")

CPU_STRIPS = 8
"""Row strips of the last step up where torch runs on a CPU: 90 ms instead of 130 for the full-width network in float32,
and a quarter of the memory at its peak."""


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution's weights [out, in / groups, height, width] and bias [out], float32, with how it is applied.

    `name` says where in the network it is: "inc.expand", "down2.0.project", "up5.1.depthwise", "audio.2", "outc".
    """

    name: str
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: int = 0
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Block:
    """An inverted residual block: expand (ReLU), depthwise (ReLU), project; added to its input if `residual`."""

    expand: Conv
    depthwise: Conv
    project: Conv
    residual: bool


class Ops(Protocol[Value]):
    """The operations that the network is made of; values are [n, channels, height, width]."""

    n_strips: int
    """Row strips of the last step up; 1 where a whole face at once is best."""

    def conv(self, x: Value, conv: Conv, *, relu: bool = False, rows_padded: tuple[int, int] | None = None) -> Value:
        """`rows_padded` says how many zero rows to add above and below, where it is not the convolution's padding."""

    def add(self, x: Value, y: Value) -> Value: ...
    def concat(self, x: Value, y: Value) -> Value:
        """Along the channels."""

    def rows(self, x: Value, start: int, stop: int) -> Value:
        """Rows [start, stop)."""

    def join_rows(self, strips: list[Value]) -> Value: ...

    def twice_the_size(self, x: Value) -> Value:
        """Bilinear, corners aligned."""

    def mask(self, x: Value, mask: Tensor) -> Value:
        """`x * mask`; mask: [1, 1, height, width] of zeros and ones."""

    def sigmoid_255(self, x: Value) -> Value:
        """`255 * sigmoid(x)`."""


def folded(name: str, conv: nn.Module, norm: nn.Module | None = None) -> Conv:
    """A convolution with the batch norm that follows it, as one."""
    assert isinstance(conv, nn.Conv2d)
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    assert bias is not None
    stride, padding = conv.stride, conv.padding
    assert isinstance(padding, tuple)
    return Conv(name, weight.detach(), bias.detach(), (stride[0], stride[1]), int(padding[0]), conv.groups)


def _block(name: str, module: nn.Module) -> Block:
    assert isinstance(module, InvertedResidual)
    layers = list(module.conv)
    expand, depthwise, project = (
        folded(f"{name}.{part}", conv, norm)
        for part, conv, norm in zip(("expand", "depthwise", "project"), layers[::3], layers[1::3], strict=True)
        if isinstance(conv, nn.Conv2d)
    )
    return Block(expand, depthwise, project, module.residual)


def _blocks(name: str, module: nn.Module) -> list[Block]:
    """The two blocks of a double convolution, wherever in `module` it is."""
    double = next(m for m in module.modules() if isinstance(m, DoubleConv))
    return [_block(f"{name}.{i}", m) for i, m in enumerate(double.double_conv)]


def _composed(outer: Conv, inner: Conv) -> Conv:
    """Two 1x1 convolutions without an activation between them, as one."""
    matrix, inner_matrix = outer.weight.flatten(1).double(), inner.weight.flatten(1).double()
    weight = (matrix @ inner_matrix).float()[:, :, None, None]
    bias = (matrix @ inner.bias.double() + outer.bias.double()).float()
    return replace(outer, weight=weight, bias=bias)


class InferencePlan(Generic[Value]):
    """The network's folded weights, and its flow.

    Levels of the encoder: 0 is the first block's hidden features at the face's size (12 channels), level i the i-th
    step down; the last is the waist.
    """

    def __init__(self, network: UNet) -> None:
        config = network.config
        self.geometry: FaceGeometry = GEOMETRIES[config.face_size]
        self.n_levels = len(config.down) + 1
        self.mouth_mask = _mouth_mask(self.geometry)
        steps = range(1, self.n_levels)
        inc = _block("inc", next(m for m in network.inc.modules() if isinstance(m, InvertedResidual)))
        self._inc_expand = _takes_rgb(inc.expand)
        self._inc_depthwise = inc.depthwise
        self._downs = [_blocks(f"down{i}", getattr(network, f"down{i}")) for i in steps]
        first = self._downs[0][0]
        self._downs[0][0] = replace(first, expand=_composed(first.expand, inc.project))
        hear = network.audio_model
        self._audio: list[Block | Conv] = [
            _block("audio.0", hear.conv1),
            _block("audio.1", hear.conv2),
            folded("audio.2", hear.conv3, hear.bn3),
            _block("audio.3", hear.conv4),
            folded("audio.4", hear.conv5, hear.bn5),
            _block("audio.5", hear.conv6),
            _block("audio.6", hear.conv7),
        ]
        self._fuse = [block for i, double in enumerate(network.fuse_conv) for block in _blocks(f"fuse.{i}", double)]
        self._ups = [_blocks(f"up{i}", getattr(network, f"up{i}")) for i in steps]
        last = self._ups[-1][0]
        n_below = last.expand.weight.shape[1] - inc.project.weight.shape[0]
        from_skip = _composed(replace(last.expand, weight=last.expand.weight[:, n_below:]), inc.project)
        weight = torch.cat((last.expand.weight[:, :n_below], from_skip.weight), dim=1)
        self._ups[-1][0] = replace(last, expand=replace(from_skip, weight=weight))
        out = folded("outc", network.outc.conv)
        self._out = replace(out, weight=out.weight.flip(0), bias=out.bias.flip(0))

    @property
    def finest(self) -> tuple[str, ...]:
        """Beginnings of the names of convolutions at the face's size, first and last: the picture's fine tones pass
        through them, so that they need more than eight bits."""
        return "inc.", f"up{self.n_levels - 1}.", "outc"

    @property
    def n_weights(self) -> int:
        """Numbers in all convolutions together."""
        loose = [self._inc_expand, self._inc_depthwise, self._out]
        blocks = [*self._fuse, *(block for pair in (*self._downs, *self._ups) for block in pair)]
        for layer in (*self._audio, *blocks):
            loose += [layer] if isinstance(layer, Conv) else [layer.expand, layer.depthwise, layer.project]
        return sum(conv.weight.numel() + conv.bias.numel() for conv in loose)

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """[channels, height, width] of an encoder level's features."""
        size = self.geometry.face_size >> level
        channels = self._downs[level - 1][1].project if level else self._inc_depthwise
        return channels.weight.shape[0], size, size

    def encode(self, ops: Ops[Value], face: Value, upto: int) -> list[Value]:
        """Levels 0 to `upto` (exclusive) of the encoder. face: [n, 3, size, size], RGB in 0..255."""
        both = ops.concat(face, ops.mask(face, self.mouth_mask))
        x = ops.conv(ops.conv(both, self._inc_expand, relu=True), self._inc_depthwise, relu=True)
        return self.encode_on(ops, [x], upto)

    def encode_on(self, ops: Ops[Value], levels: list[Value], upto: int) -> list[Value]:
        """The levels given, and those after them up to `upto` (exclusive)."""
        levels = list(levels)
        for down in self._downs[len(levels) - 1 : upto - 1]:
            levels.append(_run(ops, _run(ops, levels[-1], down[0]), down[1]))
        return levels

    def decode(self, ops: Ops[Value], levels: list[Value], audio: Value, audio_size: tuple[int, int]) -> Value:
        """The face with moved lips: [n, 3, size, size], RGB in 0..255, from all levels and the audio window.

        Args:
            audio: [n, channels, *audio_size].
        """
        x = ops.concat(levels[-1], self._hear(ops, audio, audio_size))
        for block in self._fuse:
            x = _run(ops, x, block)
        for up, skip in zip(self._ups[:-1], reversed(levels[1:-1]), strict=True):
            x = ops.concat(ops.twice_the_size(x), skip)
            for block in up:
                x = _run(ops, x, block)
        return self._last_up(ops, ops.twice_the_size(x), levels[0])

    def _last_up(self, ops: Ops[Value], below: Value, skip: Value) -> Value:
        """The last step up and the output, strip by strip. Each of its two blocks reaches one row further."""
        first, second = self._ups[-1]
        height = self.geometry.face_size
        strips = []
        for i in range(ops.n_strips):
            start, stop = height * i // ops.n_strips, height * (i + 1) // ops.n_strips
            at_top, at_bottom = int(start == 0), int(stop == height)
            if ops.n_strips > 1:
                reach = start - (0 if at_top else 2), stop + (0 if at_bottom else 2)
                x = ops.concat(ops.rows(below, *reach), ops.rows(skip, *reach))
            else:
                x = ops.concat(below, skip)
            x = _run(ops, x, first, rows_padded=(at_top, at_bottom))
            y = _hidden(ops, x, second, rows_padded=(at_top, at_bottom))
            y = ops.conv(y, second.project)
            if ops.n_strips > 1:
                x = ops.rows(x, 1 - at_top, 1 - at_top + stop - start)
            strips.append(ops.sigmoid_255(ops.conv(ops.add(x, y), self._out)))
        return strips[0] if len(strips) == 1 else ops.join_rows(strips)

    def _hear(self, ops: Ops[Value], x: Value, size: tuple[int, int]) -> Value:
        for layer in self._audio:
            if isinstance(layer, Block):
                x = _run(ops, x, layer)
                continue
            if layer.name == "audio.2":  # its stride follows the window: see UNet
                layer = replace(layer, stride=(size[0] // AUDIO_GRID, size[1] // AUDIO_GRID))
            x = ops.conv(x, layer, relu=True)
        return x


def _takes_rgb(conv: Conv) -> Conv:
    """The first convolution, for RGB in 0..255 instead of BGR in 0..1."""
    return replace(conv, weight=conv.weight[:, [2, 1, 0, 5, 4, 3]] / 255)


def _mouth_mask(geometry: FaceGeometry) -> Tensor:
    """[1, 1, size, size] float32: zero in the mouth rectangle, one elsewhere."""
    mask = torch.ones(1, 1, geometry.face_size, geometry.face_size)
    mask[:, :, slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
    return mask


def _hidden(ops: Ops[Value], x: Value, block: Block, rows_padded: tuple[int, int] | None = None) -> Value:
    return ops.conv(ops.conv(x, block.expand, relu=True), block.depthwise, relu=True, rows_padded=rows_padded)


def _run(ops: Ops[Value], x: Value, block: Block, rows_padded: tuple[int, int] | None = None) -> Value:
    y = ops.conv(_hidden(ops, x, block, rows_padded), block.project)
    return ops.add(x, y) if block.residual else y


class TorchOps:
    """The operations, executed by torch on one device in one precision, channels last in memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.n_strips = CPU_STRIPS if device.type == "cpu" else 1
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}
        self._mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that it has moved."""
        return sum(weight.nbytes + bias.nbytes for weight, bias in list(self._placed.values()))

    def place(self, x: Tensor) -> Tensor:
        """A tensor on the device, in the precision."""
        return x.to(self._device, self._dtype)

    def _place_weights(self, conv: Conv) -> tuple[Tensor, Tensor]:
        """Weights on the device; moved at their first use, which is while the model loads."""
        if conv.name not in self._placed:
            weight = conv.weight.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
            self._placed[conv.name] = weight, conv.bias.to(self._device, self._dtype)
        return self._placed[conv.name]

    def conv(self, x: Tensor, conv: Conv, *, relu: bool = False, rows_padded: tuple[int, int] | None = None) -> Tensor:
        weight, bias = self._place_weights(conv)
        padding: int | tuple[int, int] = conv.padding
        if rows_padded is not None and rows_padded != (conv.padding, conv.padding):
            x, padding = functional.pad(x, (0, 0, *rows_padded)), (0, conv.padding)
        y = functional.conv2d(x, weight, bias, conv.stride, padding, groups=conv.groups)
        return y.relu_() if relu else y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return y.add_(x)

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), dim=1)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, :, start:stop]

    def join_rows(self, strips: list[Tensor]) -> Tensor:
        return torch.cat(strips, dim=2)

    def twice_the_size(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    def mask(self, x: Tensor, mask: Tensor) -> Tensor:
        if self._mask is None:
            self._mask = mask.to(self._device, self._dtype)
        return x * self._mask

    def sigmoid_255(self, x: Tensor) -> Tensor:
        return x.float().sigmoid_().mul_(255)
