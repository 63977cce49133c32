"""The lip-sync network: a U-Net over the face with an audio branch at its waist.

State-dict compatible with the checkpoints that SyncTalk_2D and Ultralight-Digital-Human train. Two depths exist, told
apart by the keys (`down5` or not), and any channel width, read from the shapes:

    face 320 px: five times down to 10x10        face 160 px: four times down to 10x10

The audio window is [channels, height, width] with (height, width) 16x16 (AVE), 32x32 (HuBERT) or 16x32 (WeNet). The
audio branch brings each to 16x16 by the stride of one convolution, which a state dict does not record, so the stride
follows the window. AVE and HuBERT checkpoints of the 320 px network have the same keys and shapes: both windows fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipsync.errors import CheckpointError

WAIST_SIZE = 10
"""Height and width of the features where audio joins the face, in every network."""
AUDIO_GRID = 16
"""The audio branch's third convolution brings its input to 16x16."""
EXPANSION = 2
"""Channels inside an inverted residual block, per channel of its input."""
FACE_CHANNELS = 6
"""The face as it is, and the face with the mouth blacked out: 2 x BGR."""
WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Keys under which checkpoints keep their state dict, when it is not at the top."""


@dataclass(frozen=True)
class UNetConfig:
    """Every size of the network. The defaults are the full-width 320 px network with AVE or HuBERT audio."""

    audio_channels: int = 32
    inc: int = 32
    down: tuple[int, ...] = (32, 64, 128, 256, 512)
    audio: tuple[int, int, int, int] = (64, 128, 256, 512)
    fuse: tuple[int, int] = (512, 256)
    up: tuple[int, ...] = (128, 64, 32, 32, 16)

    @property
    def face_size(self) -> int:
        """Height and width of the face, in pixels: 320 or 160."""
        return WAIST_SIZE << len(self.down)

    @property
    def audio_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The audio front ends that fit, each with its window's [channels, height, width]."""
        rows = 16 if self.face_size == 320 else 8
        shapes = {
            "ave": (rows * 512 // 256, 16, 16),
            "hubert": (rows * 2048 // 1024, 32, 32),
            "wenet": (rows * 8192 // 512, 16, 32),
        }
        return {name: shape for name, shape in shapes.items() if shape[0] == self.audio_channels}

    def scaled(self, factor: float) -> UNetConfig:
        """The same network with `factor` times the channels, each a multiple of 4."""

        def scale(channels: int) -> int:
            return max(4, round(channels * factor / 4) * 4)

        return UNetConfig(
            audio_channels=self.audio_channels,
            inc=scale(self.inc),
            down=tuple(scale(c) for c in self.down),
            audio=cast("tuple[int, int, int, int]", tuple(scale(c) for c in self.audio)),
            fuse=(scale(self.fuse[0]), scale(self.fuse[1])),
            up=tuple(scale(c) for c in self.up),
        )


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project: the block that everything here is made of."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        hidden = n_in * EXPANSION
        self.residual = residual
        self.conv = nn.Sequential(
            nn.Conv2d(n_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class DoubleConv(nn.Module):
    """An inverted residual block that changes size, then one that keeps it."""

    def __init__(self, n_in: int, n_out: int, *, stride: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            InvertedResidual(n_in, n_out, stride=stride), InvertedResidual(n_out, n_out, residual=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.double_conv(x))


class InConv(nn.Module):
    """The first block. `nested` follows the checkpoint's keys: `inconv.0.conv` (320 px) or `inconv.conv` (160 px)."""

    def __init__(self, n_out: int, *, nested: bool) -> None:
        super().__init__()
        block = InvertedResidual(FACE_CHANNELS, n_out)
        self.inconv: nn.Module = nn.Sequential(block) if nested else block

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inconv(x))


class Down(nn.Module):
    """Half the height and width. (No max-pooling, in spite of the key that checkpoints use.)"""

    def __init__(self, n_in: int, n_out: int, *, nested: bool) -> None:
        super().__init__()
        block = DoubleConv(n_in, n_out, stride=2)
        self.maxpool_conv: nn.Module = nn.Sequential(block) if nested else block

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.maxpool_conv(x))


class Up(nn.Module):
    """Twice the height and width, joined with the encoder's features of that size."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = DoubleConv(n_in, n_out, stride=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return cast(Tensor, self.conv(torch.cat((x, skip), dim=1)))


class OutConv(nn.Module):
    """To three channels, BGR."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class AudioBranch(nn.Module):
    """[batch, audio_channels, 16 or 32, 16 or 32] to [batch, audio[3], 10, 10]."""

    def __init__(self, n_in: int, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        c1, c2, c3, c4 = channels
        self.conv1 = InvertedResidual(n_in, c1)
        self.conv2 = InvertedResidual(c1, c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)  # the stride follows the window, see forward
        self.bn3 = nn.BatchNorm2d(c3)
        self.conv4 = InvertedResidual(c3, c3, residual=True)
        self.conv5 = nn.Conv2d(c3, c4, 3, stride=2, padding=3)
        self.bn5 = nn.BatchNorm2d(c4)
        self.conv6 = InvertedResidual(c4, c4, residual=True)
        self.conv7 = InvertedResidual(c4, c4, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        stride = (x.shape[2] // AUDIO_GRID, x.shape[3] // AUDIO_GRID)
        x = functional.conv2d(x, self.conv3.weight, self.conv3.bias, stride=stride, padding=1)
        x = self.conv4(functional.relu(self.bn3(x)))
        x = self.conv5(x)
        return cast(Tensor, self.conv7(self.conv6(functional.relu(self.bn5(x)))))


class UNet(nn.Module):
    """Face and audio window in, face with moved lips out.

    Args of `forward`:
        face: [batch, 6, size, size] float, 0..1. Channels: BGR of the face, then BGR with the mouth blacked out.
        audio: [batch, *window] float, one feature window a face.
    Returns [batch, 3, size, size] float, 0..1, BGR.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        nested = config.face_size == 320
        encoder = (config.inc, *config.down)
        self.audio_model = AudioBranch(config.audio_channels, config.audio)
        self.fuse_conv = nn.Sequential(
            DoubleConv(config.down[-1] + config.audio[-1], config.fuse[0], stride=1),
            DoubleConv(config.fuse[0], config.fuse[1], stride=1),
        )
        self.inc = InConv(config.inc, nested=nested)
        n_steps = len(config.down)
        for i in range(n_steps):
            setattr(self, f"down{i + 1}", Down(encoder[i], encoder[i + 1], nested=nested))
        below = config.fuse[1]
        for i in range(n_steps):
            setattr(self, f"up{i + 1}", Up(below + encoder[-2 - i], config.up[i]))
            below = config.up[i]
        self.outc = OutConv(below)

    def forward(self, face: Tensor, audio: Tensor) -> Tensor:
        skips = [self.inc(face)]
        n_steps = len(self.config.down)
        for i in range(n_steps):
            skips.append(getattr(self, f"down{i + 1}")(skips[-1]))
        x = self.fuse_conv(torch.cat((skips[-1], self.audio_model(audio)), dim=1))
        for i in range(n_steps):
            x = getattr(self, f"up{i + 1}")(x, skips[-2 - i])
        return torch.sigmoid(self.outc(x))


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by key: taken out of its wrapper, without the `module.` of nn.DataParallel.

    Raises CheckpointError where there is no state dict.
    """
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    strays = [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if strays or not checkpoint:
        found = f"{strays[0]!r}, which is no tensor" if strays else "nothing"
        raise CheckpointError(
            f"not a state dict: it holds {found}; expected tensors by key, at the top or under one of "
            + ", ".join(repr(w) for w in WRAPPERS)
        )
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}


def infer_config(state: Mapping[str, Tensor]) -> UNetConfig:
    """The network's sizes, from the shapes in its state dict. Raises CheckpointError if it is another network."""

    def channels(key: str, axis: int = 0) -> int:
        if key not in state:
            raise CheckpointError(
                f"not a lip-sync U-Net: the state dict has no key {key!r} (it has {len(state)} keys"
                + (f", the first {next(iter(state))!r})" if state else ")")
            )
        return int(state[key].shape[axis])

    nested = "inc.inconv.0.conv.0.weight" in state
    steps = range(1, 6 if "down5.maxpool_conv.0.double_conv.0.conv.0.weight" in state else 5)
    dot = ".0" if nested else ""
    return UNetConfig(
        audio_channels=channels("audio_model.conv1.conv.0.weight", 1),
        inc=channels(f"inc.inconv{dot}.conv.6.weight"),
        down=tuple(channels(f"down{i}.maxpool_conv{dot}.double_conv.0.conv.6.weight") for i in steps),
        audio=(
            channels("audio_model.conv1.conv.6.weight"),
            channels("audio_model.conv2.conv.6.weight"),
            channels("audio_model.conv3.weight"),
            channels("audio_model.conv5.weight"),
        ),
        fuse=(
            channels("fuse_conv.0.double_conv.0.conv.6.weight"),
            channels("fuse_conv.1.double_conv.0.conv.6.weight"),
        ),
        up=tuple(channels(f"up{i}.conv.double_conv.0.conv.6.weight") for i in steps),
    )


def from_state_dict(checkpoint: Mapping[str, Any]) -> UNet:
    """Build the network that a checkpoint holds, with its weights, float32, in eval mode.

    Args:
        checkpoint: the state dict, bare or under `model`, `state_dict` or `model_state_dict`.
    Raises:
        CheckpointError: it is another network, keys are missing, shapes disagree, or a weight is not finite.
    """
    state = unwrap_state_dict(checkpoint)
    config = infer_config(state)
    if not config.audio_shapes:
        raise CheckpointError(
            f"the network's audio window has {config.audio_channels} channels; at {config.face_size} px the known ones "
            "are AVE, HuBERT and WeNet with " + ("32, 32 and 256" if config.face_size == 320 else "16, 16 and 128")
        )
    net = UNet(config)
    load_weights(net, state)
    return net.eval()


def load_weights(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`net.load_state_dict(state)` with errors that name the first keys at fault. Raises CheckpointError."""
    own = net.state_dict()
    # Checkpoints converted by other tools leave out the counters, which inference does not use.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    infinite = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    faults = [
        f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (
            ("missing", missing),
            ("unknown", surplus),
            ("wrong shape", shapes),
            ("NaN or infinite", infinite),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(f"the checkpoint does not fit {type(net).__name__}: " + "; ".join(faults))
    net.load_state_dict({**own, **state})
