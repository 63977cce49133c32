"""Files of weights. Nothing in them is executed, and what they claim is checked before anything is built from it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lipsync.engine.faults import Fault, listing
from lipsync.engine.unet import infer_config, unwrap_state_dict
from lipsync.errors import CheckpointError

MAX_NETWORK_BYTES = 2048 * 1024 * 1024
MAX_NETWORK_CHANNELS = 2048
"""Four times the widest layer of the full-width network."""

_TORCH_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What torch.load lets through when a file is damaged."""


def read_checkpoint(path: Path, *, kind: str | None = None) -> Mapping[str, Any]:
    """The tensors in a file of weights. Nothing in it is executed. Raises Fault.

    `kind` is the ending of its name, where `path` does not say: ".safetensors", or anything else for torch's.
    """
    size = path.stat().st_size
    if size > MAX_NETWORK_BYTES:
        raise Fault(f"{size} bytes", f"at most {MAX_NETWORK_BYTES}")
    checkpoint = _read_safetensors(path) if (kind or path.suffix).lower() == ".safetensors" else _read_pth(path)
    if not isinstance(checkpoint, Mapping) or not all(isinstance(key, str) for key in checkpoint):
        raise Fault(f"it holds a {type(checkpoint).__name__}", "a state dict: tensors by key")
    return checkpoint


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Fault(f"not a safetensors file, or cut short ({error})", "a safetensors file") from error


def _read_pth(path: Path) -> Any:
    expected = "a file of tensors alone; save the state dict as safetensors"
    with path.open("rb") as file:
        start = file.read(2)
    # torch.save writes protocol 2, or a zip; a pickle of another kind is not torch's.
    if start[:1] == pickle.PROTO and start[1:] != b"\x02":
        raise Fault("a bare pickle, which may hold code; nothing in it was run", expected)
    _check_archive(path, expected)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"(?:GLOBAL|class|function|instruction) ([\w.]+)", str(error).partition("\n")[2])
        if culprit is None:
            raise Fault("not a file of weights, or it is damaged", expected) from error
        raise Fault(f"its pickle holds code ({culprit[1]}); nothing in it was run", expected) from error
    except _TORCH_LOAD_ERRORS as error:
        raise Fault("not a file of weights, or it is damaged or cut short", expected) from error


def _check_archive(path: Path, expected: str) -> None:
    """What torch.save writes is a zip; look at its list of contents alone. Raises Fault."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise Fault("a damaged zip archive", expected) from error
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_NETWORK_BYTES:
        raise Fault(f"{unpacked} bytes when unpacked", f"at most {MAX_NETWORK_BYTES}")
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise Fault("a TorchScript program, which is code; nothing in it was run", expected)


def check_network_size(checkpoint: Mapping[str, Any]) -> None:
    """Refuse, before building it, a network wider than anyone trains: its shapes are the file's claim.

    Raises CheckpointError.
    """
    state = unwrap_state_dict(checkpoint)
    odd = [key for key, value in state.items() if value.layout != torch.strided or value.device.type != "cpu"]
    # A tensor may be a view that repeats a few bytes of the file over and over.
    odd += [k for k, v in state.items() if k not in odd and v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if odd:
        raise CheckpointError(f"tensors that are no plain arrays: {listing(odd)}")
    flat = [key for key, value in state.items() if key.endswith("conv.weight") and value.ndim != 4]
    if flat:
        raise CheckpointError(f"convolutions that have not 4 dimensions: {listing(flat)}")
    config = infer_config(state)
    widest = max(config.audio_channels, config.inc, *config.down, *config.audio, *config.fuse, *config.up)
    narrowest = min(config.audio_channels, config.inc, *config.down, *config.audio, *config.fuse, *config.up)
    if widest > MAX_NETWORK_CHANNELS or narrowest < 1:
        raise CheckpointError(f"layers of {narrowest} to {widest} channels; 1 to {MAX_NETWORK_CHANNELS} are allowed")
