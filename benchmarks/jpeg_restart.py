"""How many MCUs a JPEG segment should have: decides `MAX_RESTART_BLOCKS` in engine/jpeg.py.

    python benchmarks/jpeg_restart.py

For a 1280x720 frame and a 312x312 face, at several places: what restart markers cost in bytes and what a spliced frame
costs in time, beside compositing and encoding the whole frame without markers. Medians, alternating between settings.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image

from lipsync.engine import jpeg
from lipsync.engine.compositor import FrameRing, composite_crop, composite_frame

HEIGHT, WIDTH, FACE = 720, 1280, 312
QUALITIES = (75, 90, 95)
BLOCKS = (1, 2, 4, 5, 8, 10, 16, 20, 40, 80)
ROUNDS = 30
N_PLACES = 8


def pattern(height: int, width: int, seed: int) -> np.ndarray:
    """Something between a flat wall and noise: soft shapes, some edges, a camera's grain. uint8 RGB."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    edges = 40 * (np.indices((height, width)).sum(0) // 90 % 2)[..., None]
    return np.clip(soft * 0.8 + edges + rng.normal(0, 2, soft.shape), 0, 255).astype(np.uint8)


def timed(spent: list[float], step: Callable[..., object], *arguments: object) -> None:
    start = time.perf_counter()
    step(*arguments)
    spent.append((time.perf_counter() - start) * 1000)


def measure(quality: int) -> None:
    """Print the table of one quality."""
    frame, crop, face = pattern(HEIGHT, WIDTH, 1), pattern(328, 328, 2), pattern(320, 320, 3)
    resized = composite_crop(crop, face, FACE, FACE)
    rng = np.random.default_rng(4)
    corners = zip(rng.integers(0, WIDTH - FACE, N_PLACES), rng.integers(0, HEIGHT - FACE, N_PLACES), strict=True)
    places = [(int(x), int(y), int(x) + FACE, int(y) + FACE) for x, y in corners]
    whole_frame = Image.fromarray(frame)
    plain_bytes = len(jpeg.encode_jpeg(whole_frame, quality))

    made, pixels, kept_bytes, whole_bytes = {}, {}, {}, {}
    for blocks in BLOCKS:
        jpeg.MAX_RESTART_BLOCKS = blocks  # each of them divides the 80 columns, so this is what restart_blocks() says
        regions = [jpeg.aligned_region(place, WIDTH, HEIGHT) for place in places]
        made[blocks] = [
            (jpeg.JpegBackground.encode(frame, quality, region), FrameRing.cut(frame, region, place))
            for region, place in zip(regions, places, strict=True)
        ]
        pixels[blocks] = statistics.mean((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in regions)
        kept_bytes[blocks] = statistics.mean(background.nbytes + ring.nbytes for background, ring in made[blocks])
        whole_bytes[blocks] = len(jpeg.encode_jpeg(whole_frame, quality, blocks))

    samples: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for _, place in itertools.product(range(ROUNDS), range(N_PLACES)):
        for blocks in BLOCKS:
            background, ring = made[blocks][place]
            picture = ring.compose(resized)
            timed(samples["compose", blocks], ring.compose, resized)
            timed(samples["region", blocks], jpeg.encode_jpeg, picture, quality, blocks)
            timed(samples["splice", blocks], background.splice, picture)
        if place == 0:
            timed(samples["crop", 0], composite_crop, crop, face, FACE, FACE)
            timed(samples["composite", 0], composite_frame, frame, crop, face, places[0])
            timed(samples["whole", 0], jpeg.encode_jpeg, composite_frame(frame, crop, face, places[0]), quality)
    ms = {key: statistics.median(values) for key, values in samples.items()}

    print(
        f"\nquality {quality}: whole frame {plain_bytes / 1024:.1f} KiB, composite {ms['composite', 0]:.3f} ms, "
        f"encode {ms['whole', 0]:.3f} ms; making the crop, in all of them, {ms['crop', 0]:.3f} ms"
    )
    print(" R  bytes  region pixels  kept KiB  compose  encode region  and splice  with the crop  times faster")
    for blocks in BLOCKS:
        total = ms["crop", 0] + ms["compose", blocks] + ms["splice", blocks]
        print(
            f"{blocks:2d} {whole_bytes[blocks] / plain_bytes - 1:+6.1%} {pixels[blocks]:14.0f}"
            f"{kept_bytes[blocks] / 1024:10.1f} {ms['compose', blocks]:8.3f} {ms['region', blocks]:14.3f}"
            f"{ms['splice', blocks]:12.3f} {total:14.3f} {(ms['composite', 0] + ms['whole', 0]) / total:13.1f}"
        )


def main() -> None:
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Pillow {PIL.__version__}; times in ms"
    )
    for quality in QUALITIES:
        measure(quality)


if __name__ == "__main__":
    main()
