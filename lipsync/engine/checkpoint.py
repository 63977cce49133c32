"""Files of weights. Nothing in them is executed, and what they claim is checked before anything is built from it."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
import zlib
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
MAX_PICKLE_BYTES = 1024 * 1024
"""Of the pickle in a .pth, which names the tensors and says what they are: 150 for each. Their values lie beside it."""

_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 5
"""At the start of a file of torch's old format: two versions, what the machine was, the tensors, their storages."""
_ORDERED_DICT = "collections OrderedDict"
_CALLED = (_ORDERED_DICT, *(f"torch._utils {name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter")))
"""What a pickle of tensors calls. The first with nothing: it would copy what it is given."""
_NAMED = frozenset(
    (*_CALLED, *(f"torch {kind}Storage" for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()))
)
_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINSTRING BINSTRING "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS".split()
)
_MAX_BUILDS = 100
"""Objects that are given attributes, which copies them: a state dict is given one."""

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
    _check_pickles(path, expected)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"(?:GLOBAL|class|function|instruction) ([\w.]+)", str(error).partition("\n")[2])
        if culprit is None:
            raise Fault("not a file of weights, or it is damaged", expected) from error
        raise Fault(f"its pickle holds code ({culprit[1]}); nothing in it was run", expected) from error
    except _TORCH_LOAD_ERRORS as error:
        raise Fault("not a file of weights, or it is damaged or cut short", expected) from error


def _check_pickles(path: Path, expected: str) -> None:
    """Look at what torch.load would unpickle, where it would: torch calls some things that take any amount of memory,
    `bytearray(10**10)` among them. Raises Fault."""
    with path.open("rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    if not start.startswith(_ZIP):
        pickles = io.BytesIO(start)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(pickles, expected)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, expected)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Fault("a damaged zip archive", expected) from error


def _check_archive(archive: zipfile.ZipFile, expected: str) -> None:
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_NETWORK_BYTES:
        raise Fault(f"{unpacked} bytes when unpacked", f"at most {MAX_NETWORK_BYTES}")
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise Fault("a TorchScript program, which is code; nothing in it was run", expected)
    for entry in entries:
        if entry.filename.endswith(".pkl"):
            with archive.open(entry) as file:
                _check_pickle(io.BytesIO(file.read(MAX_PICKLE_BYTES)), expected)


def _check_pickle(file: io.BytesIO, expected: str) -> None:
    """Follow a pickle to its end without making anything. Raises Fault unless it makes tensors, lists and dicts alone.

    The stack has the names of what is called, "()" for an empty tuple, and nothing for all else.
    """
    stack: list[str | None] = []
    marks: list[int] = []
    memo: dict[object, str | None] = {}
    n_builds = 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            name, top = opcode.name, stack[-1] if stack else None
            called, given = stack[-2:] if name == "REDUCE" else (None, None)
            n_builds += name == "BUILD"
            if name not in _OPCODES or (name == "GLOBAL" and argument not in _NAMED) or n_builds > _MAX_BUILDS:
                raise _code(argument if name == "GLOBAL" else name, expected)
            if name == "REDUCE" and (called not in _CALLED or (called == _ORDERED_DICT and given != "()")):
                raise _code(called or name, expected)
            if name == "MARK":
                marks.append(len(stack))
                continue
            if name.endswith("PUT"):
                memo[argument] = top
                continue
            if pickletools.markobject in opcode.stack_before:
                n_taken = len(stack) - marks.pop() + opcode.stack_before.index(pickletools.markobject)
            else:
                n_taken = len(opcode.stack_before)
            if n_taken > len(stack) - (marks[-1] if marks else 0):
                raise ValueError("it takes what is not there")
            del stack[len(stack) - n_taken :]
            tags = {"GLOBAL": argument, "EMPTY_TUPLE": "()"}
            made = memo[argument] if name.endswith("GET") else tags.get(name)
            stack.extend([made] * len(opcode.stack_after))
    except (ValueError, LookupError, UnicodeError) as error:
        raise Fault("not a file of weights, or it is damaged", expected) from error


def _code(what: object, expected: str) -> Fault:
    return Fault(f"its pickle holds code ({str(what).replace(' ', '.')}); nothing in it was run", expected)


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
