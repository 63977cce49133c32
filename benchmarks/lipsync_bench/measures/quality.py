"""How close our frames are to what the reference composites in float32, from the same decoded pixels."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from lipsync.engine.compositor import composite_crop
from lipsync.engine.runtime import Runtime
from lipsync_bench.bench import Bench
from lipsync_bench.measures.encoder import prepared
from lipsync_bench.results import OURS, REFERENCE
from lipsync_bench.sample import Sample

QUALITY = "PSNR against the float32 composite"
BEFORE_JPEG, AFTER_JPEG = "before JPEG", "after JPEG"


def psnr_db(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    """Peak signal to noise of two pictures in 0..255, in decibels."""
    error = float(((found.astype(np.float64) - expected.astype(np.float64)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measure_quality(bench: Bench, sample: Sample, runtime: Runtime) -> None:
    """Inside the face's rectangle alone: outside of it frames are the same, which would flatter.

    Before JPEG it is the network's and the composite's precision that shows. After JPEG it is mostly the encoder's
    loss, so the reference's own frames are compared with its float32 composite too.
    """
    from lipsync_bench.reference import model

    network = sample.package.network
    for i in bench.steps("quality", range(min(bench.plan.quality_frames, len(sample)))):
        x1, y1, x2, y2 = rectangle = sample.rectangle(i)
        window = sample.windows[i : i + 1]
        bgr_crop = np.ascontiguousarray(sample.crops[i, ..., ::-1])
        predicted = model.predict(network, sample.network_input(i), window)
        expected = model.composite_float(bgr_crop, predicted, rectangle)[..., ::-1]

        (face,) = runtime.run([i], window)
        background, ring = prepared(sample, i)
        picture = ring.compose(face if runtime.resizes else composite_crop(sample.crops[i], face, x2 - x1, y2 - y1))
        top, left = ring.top.shape[0], ring.left.shape[1]
        ours = np.asarray(picture)[top : top + y2 - y1, left : left + x2 - x1]
        bench.results.add(QUALITY, OURS, BEFORE_JPEG, "dB", [psnr_db(ours, expected)])
        decoded = _decoded(background.splice(picture))[y1:y2, x1:x2]
        bench.results.add(QUALITY, OURS, AFTER_JPEG, "dB", [psnr_db(decoded, expected)])

        bgr_frame = np.ascontiguousarray(sample.frames[i, ..., ::-1])
        theirs = model.composite(bgr_frame, bgr_crop, predicted.astype(np.uint8), rectangle)
        bench.results.add(QUALITY, REFERENCE, BEFORE_JPEG, "dB", [psnr_db(theirs[y1:y2, x1:x2, ::-1], expected)])
        decoded = _decoded(model.encode(theirs))[y1:y2, x1:x2]
        bench.results.add(QUALITY, REFERENCE, AFTER_JPEG, "dB", [psnr_db(decoded, expected)])


def _decoded(jpeg: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))
