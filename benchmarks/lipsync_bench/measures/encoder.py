"""From the network's face to the JPEG of the whole frame: spliced, whole with Pillow, whole with OpenCV."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from lipsync.config import EngineConfig
from lipsync.engine.blending import HARD
from lipsync.engine.compositor import FrameRing, composite_crop, composite_frame
from lipsync.engine.geometry import BORDER
from lipsync.engine.jpeg import JpegBackground, aligned_region, encode_jpeg
from lipsync_bench.bench import Bench
from lipsync_bench.machine import importable
from lipsync_bench.sample import Sample, UInt8
from lipsync_bench.servers import JPEG_QUALITY

ENCODER, ENCODED_SIZE = "composite and encode", "encoded size"
SPLICED, SPLICED_HARD = "spliced", "spliced, hard paste"
PILLOW, OPENCV = "Pillow, whole frame", "OpenCV, whole frame"
"""The first blends as a server does by default; the others paste hard."""

Encoder = Callable[[int], bytes]
"""Makes the JPEG of one frame of the sample."""


def measure_encoder(bench: Bench, sample: Sample) -> None:
    """The ways in turn, picture by picture, in one thread. The new face is that of the frame after."""
    faces = np.roll(sample.crops[:, BORDER:-BORDER, BORDER:-BORDER], -1, axis=0)
    ways = {
        SPLICED: _spliced(sample, faces, EngineConfig().blend),
        SPLICED_HARD: _spliced(sample, faces, HARD),
        PILLOW: _pillow(sample, faces),
    }
    if importable("cv2"):
        ways[OPENCV] = _opencv(sample, faces)
    for encode in ways.values():
        encode(0)
    for picture in bench.steps("pictures", range(bench.plan.pictures)):
        for name, encode in ways.items():
            start = time.perf_counter()
            jpeg = encode(picture % len(sample))
            took_ms = (time.perf_counter() - start) * 1000
            bench.results.add(ENCODER, name, "a frame", "ms", [took_ms])
            bench.results.add(ENCODED_SIZE, name, "a frame", "bytes", [len(jpeg)])


def prepared(sample: Sample, i: int) -> tuple[JpegBackground, FrameRing]:
    """What a server keeps of a whole frame."""
    frame, rectangle = sample.frames[i], sample.rectangle(i)
    height, width, _ = frame.shape
    region = aligned_region(rectangle, width, height)
    return JpegBackground.encode(frame, JPEG_QUALITY, region), FrameRing.cut(frame, region, rectangle)


def _spliced(sample: Sample, faces: UInt8, blend: str) -> Encoder:
    kept = [prepared(sample, i) for i in range(len(sample))]

    def encode(i: int) -> bytes:
        x1, y1, x2, y2 = sample.rectangle(i)
        background, ring = kept[i]
        crop = composite_crop(sample.crops[i], faces[i], x2 - x1, y2 - y1, blend=blend)
        return background.splice(ring.compose(crop))

    return encode


def _pillow(sample: Sample, faces: UInt8) -> Encoder:
    def encode(i: int) -> bytes:
        whole = composite_frame(sample.frames[i], sample.crops[i], faces[i], sample.rectangle(i))
        return encode_jpeg(whole, JPEG_QUALITY)

    return encode


def _opencv(sample: Sample, faces: UInt8) -> Encoder:
    from lipsync_bench.reference import model

    frames, crops, bgr_faces = (np.ascontiguousarray(rgb[..., ::-1]) for rgb in (sample.frames, sample.crops, faces))

    def encode(i: int) -> bytes:
        return bytes(model.encode(model.composite(frames[i], crops[i], bgr_faces[i], sample.rectangle(i))))

    return encode
