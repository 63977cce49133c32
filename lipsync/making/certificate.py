"""The parity certificate: frames that an engine serves from the finished package, against the training recipe's own.

The recipe is written down here a second time, from the source's pictures, rectangles, features and weights to the
composite, so that an error in the engine or in the package's files shows as a difference.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lipsync import __version__
from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.unet import UNet
from lipsync.engine.video import DecodingStopped, StopSignal
from lipsync.making.crops import psnr_db, resize_bilinear
from lipsync.making.plan import FrameRef, Plan
from lipsync.making.videos import padded

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
T = TypeVar("T")

RECIPE_BORDER = 4
RECIPE_MASK = {320: (5, 5, 310, 305), 160: (5, 5, 150, 145)}
"""By face size: x, y, width and height of the rectangle that the recipe fills with black."""
RECIPE_REACH = {320: 8, 160: 4}
"""Feature rows before and after a frame that the recipe cuts out, by face size."""
BEST_DB = 99.0
"""Equal pictures: JSON has no infinity."""
JPEG_QUALITY = 95
MODEL = "package"
STOP_LOOKED_AT_S = 0.2


def certify(
    plan: Plan,
    package: Path,
    *,
    on_frame: Callable[[int, int], None] | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any]:
    """Measure a finished package. Blocking; not from within an event loop.

    Args:
        plan: what it was built from.
        package: its folder.
        on_frame: called with frames done, frames in all.
        stop: set from another thread, it ends the work.
    Returns the certificate, for the manifest; PSNR in dB.
    Raises DecodingStopped if `stop` was set, and what the engine raises.
    """
    numbers = chosen_frames(plan)
    refs = [plan.refs[number] for number in numbers]
    report = on_frame or (lambda done, total: None)
    work = _serve(package, numbers, report)
    served, how = asyncio.run(_until_stopped(work, stop))
    rows = []
    for number, ref, wanted in zip(numbers, refs, _recipe_frames(plan, numbers, refs, stop), strict=True):
        got, (x1, y1, x2, y2) = served[number], ref.rectangle
        whole, face = psnr_db(got, wanted), psnr_db(got[y1:y2, x1:x2], wanted[y1:y2, x1:x2])
        rows.append({"frame": number, "psnr_db": _rounded(whole), "face_psnr_db": _rounded(face)})
    reference = "the older package's own videos" if plan.source.kind == "package" else "the source's frames"
    return {
        "what": f"frames served from this package against the training recipe's composite from {reference}",
        "frames": rows,
        "psnr_db": _summary([row["psnr_db"] for row in rows]),
        "face_psnr_db": _summary([row["face_psnr_db"] for row in rows]),
        "measured": {"lipsync": __version__, "paste": "hard", "jpeg_quality": JPEG_QUALITY, **how},
    }


def chosen_frames(plan: Plan) -> list[int]:
    """Frames spread over the package, of those with a picture and landmarks of their own; of all, if none has."""
    exact = [i for i, ref in enumerate(plan.refs) if ref.exact] or list(range(plan.frame_count))
    n = min(plan.options.certificate_frames, len(exact))
    return [exact[i] for i in np.linspace(0, len(exact) - 1, n).round().astype(int)]


def _rounded(db: float) -> float:
    return round(min(db, BEST_DB), 2)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": round(median(values), 2)}


# What is served


async def _serve(
    package: Path, numbers: Sequence[int], on_frame: Callable[[int, int], None]
) -> tuple[dict[int, UInt8], dict[str, str]]:
    served: dict[int, UInt8] = {}
    async with Engine(EngineConfig(blend="hard", jpeg_quality=JPEG_QUALITY, result_cache_mb=0)) as engine:
        info = await engine.load(package, name=MODEL)
        for done, number in enumerate(numbers, 1):
            frame = await engine.frame(MODEL, number)
            served[number] = np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB"))
            on_frame(done, len(numbers))
        network = next(part.detail for part in info.parts if part.role == "network")
    return served, {"device": info.device, "network": network}


async def _until_stopped(work: Coroutine[Any, Any, T], stop: StopSignal | None) -> T:
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait([task], timeout=STOP_LOOKED_AT_S)
        if stop is not None and stop.is_set():
            task.cancel()
            await asyncio.wait([task])
            raise DecodingStopped
    return task.result()


# The recipe


def _recipe_frames(
    plan: Plan, numbers: Sequence[int], refs: Sequence[FrameRef], stop: StopSignal | None
) -> Iterator[UInt8]:
    shown = [ref.shown for ref in refs]
    crops = plan.crops.read(shown, stop) if plan.crops is not None else None
    for number, ref, picture in zip(numbers, refs, plan.pictures.read(shown, stop), strict=True):
        window = recipe_window(plan.features, number, plan.network)
        crop = None if crops is None else next(crops)
        yield padded(recipe_composite(picture, ref.recipe, window, plan.network, crop), *plan.padded)


def recipe_window(features: Float32, frame: int, network: UNet) -> Tensor:
    """The rows from so many before a frame to so many after it, with zeros for those that are not there.

    Args:
        features: (n, ...) float32.
    Returns [1, channels, height, width] float32, as the network hears it.
    """
    reach = RECIPE_REACH[network.config.face_size]
    left, right = frame - reach, frame + reach
    before, after = max(-left, 0), max(right - len(features), 0)
    rows = torch.from_numpy(np.array(features[max(left, 0) : min(right, len(features))]))
    rows = torch.cat([rows.new_zeros(before, *rows.shape[1:]), rows, rows.new_zeros(after, *rows.shape[1:])])
    return rows[: 2 * reach].reshape(1, *_window_shape(features, network))


def _window_shape(features: Float32, network: UNet) -> tuple[int, int, int]:
    grids = {512: (16, 16), 2 * 1024: (32, 32), 16 * 512: (16, 32)}
    return network.config.audio_channels, *grids[int(np.prod(features.shape[1:]))]


def recipe_composite(
    picture: UInt8, rectangle: Rectangle, window: Tensor, network: UNet, crop: UInt8 | None = None
) -> UInt8:
    """The frame as the training recipe makes it.

    Args:
        picture: (height, width, 3) uint8 RGB.
        rectangle: x1, y1, x2, y2 as landmarks give it; what leaves the frame is not cut.
        window: what the network hears.
        network: float32, in eval mode, on the CPU.
        crop: an older package's crop, which takes the place of the one cut out here.
    Returns (height, width, 3) uint8 RGB.
    """
    size = network.config.face_size
    x1, y1, x2, y2 = (max(corner, 0) for corner in rectangle)
    region = picture[y1:y2, x1:x2]
    height, width = region.shape[:2]
    merged = (
        resize_bilinear(region, size + 2 * RECIPE_BORDER, size + 2 * RECIPE_BORDER) if crop is None else crop.copy()
    )
    inner = slice(RECIPE_BORDER, RECIPE_BORDER + size)
    face = merged[inner, inner, ::-1].copy()  # BGR
    masked = face.copy()
    x, y, mask_width, mask_height = RECIPE_MASK[size]
    masked[y : y + mask_height, x : x + mask_width] = 0
    planes = np.concatenate([face.transpose(2, 0, 1), masked.transpose(2, 0, 1)]).astype(np.float32) / 255
    with torch.inference_mode():
        moved = network(torch.from_numpy(planes)[None], window)[0].numpy()
    merged[inner, inner] = (moved.transpose(1, 2, 0) * 255).astype(np.uint8)[..., ::-1]
    whole = picture.copy()
    whole[y1:y2, x1:x2] = resize_bilinear(merged, width, height)
    return whole
