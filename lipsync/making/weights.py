"""Checkpoints in, by the engine's safe reader; safetensors out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lipsync.engine.audio import AudioEncoder, encoder_from_state_dict
from lipsync.engine.checkpoint import check_network_size, read_checkpoint
from lipsync.engine.faults import Fault
from lipsync.engine.unet import UNet, from_state_dict, unwrap_state_dict
from lipsync.errors import CheckpointError

ENCODER_PREFIX = "audio_encoder."
MAX_ENCODER_CHANNELS = 2048
"""Four times the widest layer of the usual one."""


def read_network(path: Path) -> tuple[UNet, dict[str, Tensor]]:
    """A checkpoint's network, float32 in eval mode, and its tensors as they are. Raises Fault, OSError."""
    checkpoint = read_checkpoint(path)
    try:
        check_network_size(checkpoint)
        return from_state_dict(checkpoint), unwrap_state_dict(checkpoint)
    except CheckpointError as error:
        raise Fault(str(error), "a state dict of the lip-sync network") from error


def read_encoder(path: Path) -> tuple[AudioEncoder, dict[str, Tensor]]:
    """An audio encoder, and its tensors under the keys that packages have. Raises Fault, OSError.

    SyncTalk_2D's file has the same keys without their prefix, and such files may hold a video encoder, too.
    """
    expected = "a state dict of the AVE audio encoder"
    try:
        state = unwrap_state_dict(read_checkpoint(path))
        if any(key.startswith(ENCODER_PREFIX) for key in state):
            state = {key: value for key, value in state.items() if key.startswith(ENCODER_PREFIX)}
        else:
            state = {ENCODER_PREFIX + key: value for key, value in state.items()}
        _check_sizes(state)
        return encoder_from_state_dict(state), state
    except CheckpointError as error:
        raise Fault(str(error), expected) from error


def _check_sizes(state: Mapping[str, Tensor]) -> None:
    """Refuse shapes that a file may claim without holding them, before a network is built from them."""
    for key, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"a tensor that is no plain array: {key}")
        if any(side > MAX_ENCODER_CHANNELS for side in value.shape):
            raise CheckpointError(f"{key} is {list(value.shape)}; at most {MAX_ENCODER_CHANNELS} a side are allowed")


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; each gets memory of its own, which the format asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {key: value.detach().clone().contiguous() for key, value in state.items()}
    path.write_bytes(safetensors.torch.save(own))  # its save_file makes files that nobody else may read
