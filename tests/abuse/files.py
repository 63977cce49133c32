"""Packages that are not what they say, and names that lead elsewhere: rows 17 to 24."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from optimized_lipsyncsrv import BatchInferenceResponse, LoadPackageResponse, OptimizedInferenceResponse
from PIL import Image

from tests.abuse.rows import Findings, Target, row
from tests.abuse.servers import Bench
from tests.abuse.wire import counted
from tests.abuse.wire_client import Answer, Wire, frame_request, int_field, text_field

LOAD_S = 60.0
LOAD_MS = 5000.0
"""A package that is refused is refused within this."""
BUILD_RSS_MB = 1500.0
REFUSED = ("PERMISSION_DENIED", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
BAD = "bad"

Damage = Callable[[Path], object]


def said(answer: Answer) -> str:
    """What came of a load: "loaded", "refused" with the first problem, or a status."""
    if answer.said != "OK" or not answer.messages:
        return answer.said
    response = LoadPackageResponse().parse(answer.messages[0])
    return "loaded" if response.success else f"refused ({first_problem(response.error)})"


def first_problem(error: str) -> str:
    lines = [line.strip(" -") for line in error.splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else "no reason")[:160]


async def load(target: Target, name: str, path: str | bytes = "") -> Answer:
    """Ask for it, on a connection of its own."""
    async with Wire(target.address) as wire:
        return await wire.call("LoadPackage", text_field(1, name) + text_field(2, path), wait_s=LOAD_S)


async def unload(target: Target, name: str) -> str:
    async with Wire(target.address) as wire:
        return (await wire.call("UnloadPackage", text_field(1, name), wait_s=LOAD_S)).said


@contextlib.asynccontextmanager
async def copy_of(target: Target, name: str = BAD) -> AsyncIterator[Path]:
    """A good package of this name in the server's folder, to be damaged."""
    models = Path(target.config.models)
    folder = models / name
    await asyncio.to_thread(shutil.copytree, models / target.model, folder)
    try:
        yield folder
    finally:
        await unload(target, name)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def refuse(
    target: Target, found: Findings, cases: dict[str, Damage], *, secret: str = "", harmless: Sequence[str] = ()
) -> None:
    """Each damage alone: the package is not loaded, in time, and the answer names no path of the server's.

    Those named in `harmless` may also be loaded: what lies in them is not believed anyway.
    """
    for what, damage in cases.items():
        async with copy_of(target) as folder:
            await asyncio.to_thread(damage, folder)
            start = time.monotonic()
            answer = await load(target, BAD)
            took_ms = 1000 * (time.monotonic() - start)
            result = said(answer)
            right = result.startswith("refused") or result in (*REFUSED, "RESOURCE_EXHAUSTED")
            found.check(right or (what in harmless and result == "loaded"), f"{what}: {result}")
            if took_ms > LOAD_MS:
                found.wrong.append(f"{what}: after {took_ms:.0f} ms")
            shown = answer.text + answer.body.decode(errors="replace")
            if str(folder.parent) in shown or (secret and secret in shown):
                found.wrong.append(f"{what}: the answer names {folder.parent if not secret else secret}")


def features(folder: Path) -> Path:
    return next(folder.glob("aud_*.npy"))


def crops(folder: Path) -> Path:
    return next(folder.glob("crops_*.mp4"))


def weights(folder: Path) -> Path:
    return next(folder.glob("checkpoint/*.safetensors"))


def change_features(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    def damage(folder: Path) -> None:
        np.save(features(folder), change(np.load(features(folder))))

    return damage


def with_value(value: float) -> Damage:
    def change(array: np.ndarray) -> np.ndarray:
        array[len(array) // 2, 3] = value
        return array

    return change_features(change)


@row(
    "17",
    "Numbers that are none, and requests that make no sense",
    "packages whose features hold NaN, infinity, 1e38, or have another type, shape or length; a batch of no frames, of "
    "the same frame twice, of negative frames and of 100,000; frames of 2^31 and 2^63",
    timeout_s=120,
    disturbs=True,
    max_growth_mb=200,
)
async def numbers(target: Target, found: Findings) -> None:
    await refuse(
        target,
        found,
        {
            "NaN": with_value(np.nan),
            "infinity": with_value(np.inf),
            "complex features": change_features(lambda a: a.astype(complex)),
            "features of text": change_features(lambda a: a.astype("U8")),
            "features of 3 numbers": change_features(lambda a: a[:, :3]),
            "features of one dimension": change_features(np.ravel),
            "no features": change_features(lambda a: a[:0]),
            "twice as many features": change_features(lambda a: np.concatenate([a, a])),
        },
    )
    async with copy_of(target) as folder:
        await asyncio.to_thread(with_value(1e38), folder)
        result = said(await load(target, BAD))
        async with Wire(target.address) as wire:
            answer = await wire.call("GenerateInference", frame_request(BAD, target_frame(target)), wait_s=30)
            frame = OptimizedInferenceResponse().parse(answer.messages[0]) if answer.messages else None
            if frame is not None and frame.success:
                pixels = np.asarray(Image.open(io.BytesIO(frame.prediction_data)))
                found.check(pixels.dtype == np.uint8, f"1e38 among the features: {result}; frames are {pixels.dtype}")
            else:
                why = frame.error if frame is not None else answer.said
                found.check("Traceback" not in why, f"1e38 among the features: {result}; {why[:120]}")
    model = text_field(1, target.model)
    async with Wire(target.address) as wire:
        empty = await wire.call("GenerateBatchInference", model)
        found.expect("a batch of no frames", empty.said, ("INVALID_ARGUMENT", "OK"))
        twice = await wire.call("GenerateBatchInference", model + int_field(2, 3) * 2)
        parts = BatchInferenceResponse().parse(twice.messages[0]).responses if twice.messages else []
        same = len(parts) == 2 and parts[0].prediction_data == parts[1].prediction_data != b""
        found.check(same, f"a frame twice (which the contract allows): {twice.said}, two equal pictures: {same}")
        many = await wire.call("GenerateBatchInference", model + int_field(2, 1) * 100_000)
        found.expect("100,000 frames", many.said, ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"))
        for what, frame_id in (("-1", -1), ("2^31", 2**31), ("2^63", 2**63), ("-2^31", -(2**31))):
            answer = await wire.call("GenerateInference", frame_request(target.model, frame_id))
            frame = OptimizedInferenceResponse().parse(answer.messages[0]) if answer.messages else None
            # a number of more than 32 bits is cut to 32, as protobuf has it: 2^63 is frame 0
            right = frame is not None and (not frame.success or frame_id == 2**63)
            error = "a frame" if frame is not None and frame.success else getattr(frame, "error", "")
            found.check(right or answer.said in REFUSED, f"frame {what}: {answer.said} {error[:80]}")


def target_frame(target: Target) -> int:
    return getattr(target, "n_frames", 20) // 2


# images


BUILD = """
import sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from lipsync.making.build import SourceRefused, build_package
from lipsync.making.source import SourceOptions
from lipsync.errors import LipsyncError
try:
    build_package(Path(sys.argv[1]), Path(sys.argv[2]), SourceOptions(certificate_frames=0))
    print("built")
except (LipsyncError, SourceRefused) as error:
    print("refused:", " ".join(str(error).split())[:300])
# not getrusage(): that counts what the process that this one was forked from had
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) / 1000)
"""


def jpeg_saying(width: int, height: int) -> bytes:
    """A JPEG whose header says this size."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    data = bytearray(out.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def progressive_bomb() -> bytes:
    """A small progressive file of many pixels and 300 scans."""
    out = io.BytesIO()
    Image.new("L", (8000, 4000)).save(out, "JPEG", progressive=True, quality=1)
    data = out.getvalue()
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    return data[:-2] + scan * 300 + data[-2:]


def cmyk() -> bytes:
    out = io.BytesIO()
    Image.new("CMYK", (720, 1280)).save(out, "JPEG")
    return out.getvalue()


def png_16_bit() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((1280, 720), np.uint16)).save(out, "PNG")
    return out.getvalue()


def png_bomb() -> bytes:
    """A PNG of 30,000 x 30,000 in 100 kB."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compressobj(9)
    rows = b"".join(body.compress(bytes(30_001)) for _ in range(3000)) + body.flush()
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@row(
    "18",
    "Images that are bombs",
    "to `lipsync package build`, as one frame of a training folder: a JPEG cut short, one that says 65,500 x 65,500, "
    "CMYK, a progressive one of 8,000 x 4,000 and 300 scans, a PNG of 16 bits, one of 30,000 x 30,000, a JPEG with a "
    "zip behind it, a text",
    own=True,
    timeout_s=240,
)
async def images(bench: Bench, found: Findings) -> None:
    from tests.making.training import make_training_folder

    base = bench.folder / "training"
    await asyncio.to_thread(make_training_folder, base, frames=30, crop=168, epochs=[3])
    first = sorted((base / "full_body_img").iterdir())[5]
    good = first.read_bytes()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x.py", "print(1)")
    cases = {
        "cut short": good[: len(good) // 2],
        "65,500 x 65,500": jpeg_saying(65_500, 65_500),
        "CMYK": cmyk(),
        "progressive, 300 scans": progressive_bomb(),
        "16 bits": png_16_bit(),
        "PNG of 30,000 x 30,000": png_bomb(),
        "a zip behind it": good + zipped.getvalue(),
        "a text": b"GIF89a, or so it says",
    }
    for what, data in cases.items():
        first.write_bytes(data)
        start = time.monotonic()
        out, err, peak = await build(base, bench.folder / "built")
        took = time.monotonic() - start
        word = out.splitlines()[0] if out else err[-200:]
        # a frame that cannot be read is a hole, which shows the frame before
        right = word.startswith("refused:") or word == "built"
        found.check(right, f"{what} ({len(data) / 1000:.0f} kB): {word[:160]}; {took:.1f} s, {peak:.0f} MB at most")
        if peak > BUILD_RSS_MB:
            found.wrong.append(f"{what}: {peak:.0f} MB")
        await asyncio.to_thread(shutil.rmtree, bench.folder / "built", ignore_errors=True)
    first.write_bytes(good)
    await asyncio.to_thread(shutil.rmtree, base)


async def build(source: Path, target: Path) -> tuple[str, str, float]:
    """`build_package` in a process of its own: what it printed, its errors, its peak memory in MB."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BUILD, str(source), str(target), ".", os.getcwd()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        return "not done within 60 s", "", 0.0
    text = out.decode(errors="replace")
    peak = float(text.rpartition("peak ")[2]) if "peak " in text else 0.0
    return text, err.decode(errors="replace"), peak


# videos


def boxes(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Where the top boxes of an MP4 are: start and end."""
    found, at = {}, 0
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found[kind] = (at, at + size)
        at += max(size, 8)
    return found


def video(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "full_body.mp4"
        path.write_bytes(change(path.read_bytes()))

    return damage


def patched(marker: bytes, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """With bytes changed, some way after a marker."""

    def change(data: bytes) -> bytes:
        at = data.index(marker) + offset
        return data[:at] + value + data[at + len(value) :]

    return change


def without_moov(data: bytes) -> bytes:
    start, end = boxes(data)[b"moov"]
    return data[:start] + data[end:]


def huge_track(data: bytes) -> bytes:
    at = data.index(b"tkhd") + 4 + 76
    return data[:at] + struct.pack(">II", 32_768 << 16, 32_768 << 16) + data[at + 8 :]


def huge_sample_entry(data: bytes) -> bytes:
    at = data.index(b"avc1") + 4 + 24
    return huge_track(data)[:at] + struct.pack(">HH", 32_768, 32_768) + huge_track(data)[at + 4 :]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@row(
    "19",
    "Videos that are bombs or playlists",
    "as full_body.mp4: no moov, cut short, a track of 32,768 x 32,768, 10^9 frames in a sample table, a duration of "
    "years, a sample table that lies, an HLS playlist, a concat list, a DASH manifest, an HTML page, nothing, noise",
    timeout_s=150,
    disturbs=True,
    max_growth_mb=200,
)
async def videos(target: Target, found: Findings) -> None:
    rng = np.random.default_rng(19)
    cases = {
        "no moov": video(without_moov),
        "cut short": video(lambda data: data[: len(data) // 2]),
        "32,768 x 32,768": video(huge_sample_entry),
        "10^9 frames": video(patched(b"stsz", 12, struct.pack(">I", 10**9))),
        "10^9 frames of one size": video(patched(b"stsz", 8, struct.pack(">II", 1, 10**9))),
        "10^9 times": video(patched(b"stts", 8, struct.pack(">III", 1, 10**9, 512))),
        "a box of 2^63 bytes": video(lambda data: data + struct.pack(">I4sQ", 1, b"mdat", 2**63)),
        "samples outside of the file": video(patched(b"stco", 12, b"\xff\xff\xff\x00")),
        "a HLS playlist": video(lambda data: PLAYLIST),
        "a concat list": video(lambda data: b"ffconcat version 1.0\nfile '/etc/passwd'\n"),
        "a DASH manifest": video(
            lambda data: b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1:1/</BaseURL></MPD>'
        ),
        "HTML": video(lambda data: b"<html><script src='http://127.0.0.1:1'></script></html>"),
        "nothing": video(lambda data: b""),
        "noise": video(lambda data: rng.bytes(len(data))),
        "noise in the pictures": video(lambda data: noisy(data, rng)),
    }
    # sizes and times of a header are not believed: the pictures say how large they are, and how many
    await refuse(target, found, cases, harmless=("32,768 x 32,768", "10^9 times"))


def noisy(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = boxes(data)[b"mdat"]
    return data[: start + 8] + rng.bytes(end - start - 8) + data[end:]


# arrays and weights


def npy_saying(shape: str, dtype: str = "<f4") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head.encode() + b"\n" + bytes(64)


def write_features(data: bytes) -> Damage:
    return lambda folder: features(folder).write_bytes(data)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self._path), "w"))


@row(
    "20",
    "Arrays that are bombs",
    "as features: an array of objects with a pickle that would make a file, 10^12 elements in a header, a negative "
    "shape, a shape that overflows, a header of 1 MB, an npz with a zip bomb, a header that is code",
    timeout_s=120,
    disturbs=True,
    max_growth_mb=150,
)
async def arrays(target: Target, found: Findings) -> None:
    canary = Path(target.config.models).parent / "canary-npy"
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_saying("(250000000,)") + bytes(100_000_000))

    def objects(folder: Path) -> None:
        array = np.empty(19, dtype=object)
        array[:] = [Canary(canary)] * 19
        np.save(features(folder), array, allow_pickle=True)

    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1_000_000) + b"{" + b" " * 999_999
    evil = b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"__import__('os').system('touch /tmp/x')".ljust(60)
    await refuse(
        target,
        found,
        {
            "objects": objects,
            "10^12 elements": write_features(npy_saying("(1953125000, 512)")),
            "a negative shape": write_features(npy_saying("(-1, 512)")),
            "a shape that overflows": write_features(npy_saying("(9223372036854775807, 512)")),
            "a header of 1 MB": write_features(long),
            "a header that is code": write_features(evil),
            "a zip bomb": write_features(bomb.getvalue()),
            "rows deeper than any": write_features(npy_saying("(" + "1," * 2000 + ")")),
            "a subarray type": write_features(npy_saying("(19, 512)", "('<f4', (1000000,))")),
        },
    )
    found.check(not canary.exists(), "the pickle was not opened" if not canary.exists() else "THE PICKLE RAN")
    canary.unlink(missing_ok=True)


@row(
    "21",
    "Weights that are programs",
    "as weights: pickles that would make a file, bare and in torch's zip; a zip bomb; safetensors whose header is "
    "10^12 bytes, whose tensors overlap, lie outside of the file, are too many, NaN, of the wrong shape, or missing",
    timeout_s=200,
    disturbs=True,
    max_growth_mb=400,
)
async def checkpoints(target: Target, found: Findings) -> None:
    import safetensors.torch

    canary = Path(target.config.models).parent / "canary-pth"

    def pth(write: Callable[[Path], object]) -> Damage:
        def damage(folder: Path) -> None:
            path = weights(folder)
            path.unlink()
            write(path.with_suffix(".pth"))

        return damage

    def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
        def damage(folder: Path) -> None:
            state = safetensors.torch.load_file(weights(folder))
            state = {name: tensor.clone() for name, tensor in state.items()}
            change(state)
            safetensors.torch.save_file(state, weights(folder))

        return damage

    def header(text: bytes, size: int | None = None, body: bytes = bytes(64)) -> Damage:
        data = struct.pack("<Q", len(text) if size is None else size) + text + body
        return lambda folder: weights(folder).write_bytes(data)

    def zip_bomb(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
            with archive.open("archive/data/0", "w", force_zip64=True) as file:
                for _ in range(300):
                    file.write(bytes(10_000_000))

    tensor = json.dumps({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    overlap = {f"t{i}": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for i in range(100)}
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}

    def nan(state: dict[str, torch.Tensor]) -> None:
        first = next(each for each in state.values() if each.is_floating_point() and each.numel() > 10)
        first.flatten()[3] = float("nan")

    def without_one(state: dict[str, torch.Tensor]) -> None:
        state.pop(next(name for name, each in state.items() if name.endswith("weight") and each.ndim == 4))

    def transposed(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name, each in state.items() if each.ndim == 4 and each.shape[0] != each.shape[1])
        state[name] = state[name].transpose(0, 1).contiguous()

    await refuse(
        target,
        found,
        {
            "a pickle": pth(lambda path: path.write_bytes(pickle.dumps({"w": Canary(canary)}, protocol=2))),
            "a pickle, protocol 5": pth(lambda path: path.write_bytes(pickle.dumps({"w": Canary(canary)}, protocol=5))),
            "torch's zip": pth(lambda path: torch.save({"w": Canary(canary)}, path)),
            "torch's older form": pth(
                lambda path: torch.save({"w": Canary(canary)}, path, _use_new_zipfile_serialization=False)
            ),
            "a zip bomb": pth(zip_bomb),
            "a header of 10^12 bytes": header(b"{}", 10**12),
            "a tensor outside of the file": header(tensor),
            "tensors that overlap": header(json.dumps(overlap).encode()),
            "200,000 tensors": header(json.dumps(many).encode()),
            "JSON 100,000 deep": header(b"[" * 100_000),
            "NaN": tensors(nan),
            "a shape that does not fit": tensors(transposed),
            "a layer missing": tensors(without_one),
            "a layer too many": tensors(lambda state: state.update(extra=torch.zeros(3))),
        },
    )
    found.check(not canary.exists(), "no pickle was opened" if not canary.exists() else "A PICKLE RAN")
    canary.unlink(missing_ok=True)


# names


@row(
    "22",
    "Names and paths that lead elsewhere",
    "as package_path and model_name: ../x, absolute, a/../../x, NUL, C:\\x, %2e%2e, dots in other alphabets, 4,096 "
    "characters, of what is there and of what is not; 20 times each for the time it takes",
    timeout_s=120,
)
async def paths(target: Target, found: Findings) -> None:
    models = Path(target.config.models)
    outside = models.parent / "outside"
    outside.mkdir(exist_ok=True)
    cases: dict[str, str | bytes] = {
        "../ of what is there": "../outside",
        "../ of what is not": "../nothing-here",
        "absolute, there": "/etc",
        "absolute, not there": "/no/such/place",
        "a/../../x": f"{target.model}/../../outside",
        "C:\\x": "C:\\x",
        "%2e%2e": "%2e%2e/outside",
        "dots of full width": "\uff0e\uff0e/outside",
        "one-dot leaders": "\u2024\u2024/outside",
        "4,096 characters": "a" * 4096,
        "100,000 characters": "a/" * 50_000,
        "NUL": b"anna\0/../../outside",
        "line breaks": "anna\nX: y",
        "~": "~root",
        "$HOME": "$HOME",
    }
    texts: dict[str, str] = {}
    times: dict[str, float] = {}
    async with Wire(target.address) as wire:
        for what, path in cases.items():
            took = []
            for _ in range(20):
                start = time.perf_counter()
                answer = await wire.call("LoadPackage", text_field(1, "x") + text_field(2, path))
                took.append(time.perf_counter() - start)
            result = said(answer)
            found.check(result in REFUSED or result.startswith("refused"), f"{what}: {result}")
            texts[what] = answer.text + answer.body.decode(errors="replace")
            times[what] = sorted(took)[len(took) // 2]
            if any(str(each) in texts[what] for each in (models, models.parent, Path.home())):
                found.wrong.append(f"{what}: the answer names a path of the server's")
        for there, gone in (("../ of what is there", "../ of what is not"), ("absolute, there", "absolute, not there")):
            same = texts[there] == texts[gone]
            found.check(same, f"{there} and {gone}: {'the same answer' if same else 'other answers'}")
            apart = 1000 * abs(times[there] - times[gone])
            found.check(apart < 3.0, f"in {1000 * times[there]:.1f} and {1000 * times[gone]:.1f} ms (medians of 20)")
        for what, name in (
            ("name with a slash", "a/b"),
            ("name with dots", ".."),
            ("name of 65", "a" * 65),
            ("no name", ""),
            ("name with ANSI", "\x1b[31mred"),
            ("name with a line break", "a\nb"),
        ):
            answer = await wire.call("LoadPackage", text_field(1, name) + text_field(2, target.model))
            found.expect(f"model_name, {what}", answer.said, ("INVALID_ARGUMENT", "PERMISSION_DENIED"))
            if answer.said == "OK":
                await unload(target, name)
    outside.rmdir()


@row(
    "23",
    "Links, devices and pipes in a package",
    "a package that is a link to another folder; in a package, as its video and its weights: a link out of the folder, "
    "a hard link, a FIFO, a device, a folder, a socket; a file that is swapped for a link a thousand times meanwhile",
    timeout_s=150,
    disturbs=True,
    max_growth_mb=200,
)
async def links(target: Target, found: Findings) -> None:
    models = Path(target.config.models)
    secret = models.parent / "secret.safetensors"
    video_file = "full_body.mp4"

    def replace(name: str, make: Callable[[Path], object]) -> Damage:
        def damage(folder: Path) -> None:
            path = weights(folder) if name == "weights" else folder / name
            if name == "weights":
                shutil.copy(path, secret)
            path.unlink()
            make(path)

        return damage

    def device(path: Path) -> None:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))

    def unix_socket(path: Path) -> None:
        import socket

        here = os.getcwd()
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                os.chdir(path.parent)
                sock.bind(path.name)
            finally:
                os.chdir(here)

    cases: dict[str, Damage] = {
        "weights, a link out": replace("weights", lambda path: path.symlink_to(secret)),
        "video, a link to /etc/passwd": replace(video_file, lambda path: path.symlink_to("/etc/passwd")),
        "video, a FIFO": replace(video_file, os.mkfifo),
        "weights, a FIFO": replace("weights", os.mkfifo),
        "video, a folder": replace(video_file, Path.mkdir),
        "video, a socket": replace(video_file, unix_socket),
        "features, a link to /dev/zero": lambda folder: (
            features(folder).unlink(),
            (folder / "aud_ave.npy").symlink_to("/dev/zero"),
        ),
        "manifest, a FIFO": lambda folder: os.mkfifo(folder / "package.json"),
    }
    if os.geteuid() == 0:
        cases["video, a device"] = replace(video_file, device)
    await refuse(target, found, cases, secret=str(secret))
    # a package that is a link, to a good package outside
    outside = models.parent / "good-outside"
    await asyncio.to_thread(shutil.copytree, models / target.model, outside)
    (models / "linked").symlink_to(outside)
    try:
        result = said(await load(target, "linked"))
        found.check(result in REFUSED or result.startswith("refused"), f"a package that is a link out: {result}")
    finally:
        await unload(target, "linked")
        (models / "linked").unlink()
    # swapped between look and open
    async with copy_of(target) as folder:
        path = weights(folder)
        kept = path.with_name("kept")
        shutil.copy(path, kept)
        shutil.copy(path, secret)
        stop = asyncio.Event()

        def swap() -> int:
            n = 0
            while not stop.is_set():
                for make in (lambda p: p.symlink_to(secret), lambda p: os.link(kept, p)):
                    spare = path.with_name("spare")
                    make(spare)
                    os.replace(spare, path)
                    n += 1
                time.sleep(0.0005)
            return n

        swapping = asyncio.create_task(asyncio.to_thread(swap))
        results = []
        try:
            for _ in range(10):
                results.append(said(await load(target, BAD)).partition(" (")[0])
                await unload(target, BAD)
        finally:
            stop.set()
            n = await swapping
        found.note(
            f"swapped {n:,} times meanwhile: {', '.join(f'{results.count(r)} {r}' for r in sorted(set(results)))}"
        )
        odd = [r for r in results if r not in (*REFUSED, "loaded", "refused")]
        found.check(not odd, "each load found the file itself, or refused" if not odd else f"also {odd}")
    await asyncio.to_thread(shutil.rmtree, outside)
    secret.unlink(missing_ok=True)


@row(
    "24",
    "Packages that are half there",
    "a package loaded while it is written; a manifest that lies about frames, size, files and hashes; a reload of a "
    "package that was damaged on disk; a build into a full disk",
    timeout_s=200,
    disturbs=True,
    max_growth_mb=250,
)
async def half(target: Target, found: Findings) -> None:
    def manifest(**changes: object) -> Damage:
        def damage(folder: Path) -> None:
            path = folder / "package.json"
            said = {"format": "lipsync-package", "version": 1, "name": "Ada"}
            if path.exists():
                said = json.loads(path.read_text())
            path.write_text(json.dumps({**said, **changes}))

        return damage

    await refuse(
        target,
        found,
        {
            "no video yet": lambda folder: crops(folder).unlink(),
            "half of the weights": lambda folder: os.truncate(weights(folder), weights(folder).stat().st_size // 2),
            "half of a manifest": lambda folder: (folder / "package.json").write_text('{"format": "lipsync-pack'),
            "a manifest of another kind": manifest(format="malware"),
            "a later version": manifest(version=999),
            "files outside": manifest(files={"full_body": "../../etc/passwd"}),
            "10^9 frames": manifest(frame_count=10**9),
            "another frame rate": manifest(fps=60),
        },
    )
    async with copy_of(target) as folder:
        first = said(await load(target, BAD))
        async with Wire(target.address) as wire:
            before = await wire.call("GenerateInference", frame_request(BAD, 3), wait_s=30)
            os.truncate(weights(folder), 100)
            again = said(await load(target, BAD))
            after = await wire.call("GenerateInference", frame_request(BAD, 3), wait_s=30)
        frames = [
            OptimizedInferenceResponse().parse(answer.messages[0]).prediction_data if answer.messages else b""
            for answer in (before, after)
        ]
        found.check(first == "loaded" and again != "loaded", f"{first}, then damaged and loaded again: {again}")
        found.check(frames[0] == frames[1] != b"", "the old one serves on, with the same picture")
    async with copy_of(target) as folder:
        parts = sorted(path for path in folder.rglob("*") if path.is_file())
        whole = {path: path.read_bytes() for path in parts}
        required = {crops(folder), folder / "full_body.mp4", features(folder), weights(folder)}
        required.add(folder / "crop_rectangles.json")
        for path in parts:
            path.unlink()
        results, early = [], 0
        for path in parts:  # as a copy does: one file after the other, each in two halves
            for piece in (whole[path][: len(whole[path]) // 2], whole[path]):
                path.write_bytes(piece)
                results.append(said(await load(target, BAD)).partition(" (")[0])
                if piece == whole[path]:
                    required.discard(path)
                early += results[-1] == "loaded" and (bool(required) or piece != whole[path])
                await unload(target, BAD)
        found.check(
            not early and results[-1] == "loaded",
            f"loaded at every step of a copy: {counted(results)}; {early} times before what it needs was there",
        )
    await full_disk(target, found)


async def full_disk(target: Target, found: Findings) -> None:
    """`lipsync package build` where there is no room."""
    from tests.making.training import make_training_folder

    if os.geteuid() != 0:
        found.note("a full disk: not tried, for want of root to mount one")
        return
    work = Path(target.config.models).parent / "disk"
    work.mkdir()
    process = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(work))
    if await process.wait():
        found.note("a full disk: not tried, it could not be mounted")
        return
    try:
        base = Path(target.config.models).parent / "training"
        await asyncio.to_thread(make_training_folder, base, frames=30, crop=168, epochs=[3])
        out, err, _ = await build(base, work / "built")
        word = out.splitlines()[0] if out else err.strip().splitlines()[-1]
        left = sorted(path.name for path in work.iterdir())
        found.check(not (work / "built").exists(), f"a full disk: {word[:200]}; left behind: {left or 'nothing'}")
        found.check("Traceback" not in err, "without a traceback" if "Traceback" not in err else f"traceback: {word}")
        await asyncio.to_thread(shutil.rmtree, base)
    finally:
        process = await asyncio.create_subprocess_exec("umount", str(work))
        await process.wait()
        work.rmdir()
