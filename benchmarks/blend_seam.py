"""How a face should meet the frame around it: decides the setting `blend`, and `FEATHER_PIXELS` in engine/blending.py.

    python benchmarks/blend_seam.py [--picture docs/blending.jpg]

On 40 frames of the demo package: seams, colours and times of the three blends, for the demo's own network, and for the
same with a colour cast, over the whole face or inside of the mouth's mask alone. `--picture` draws them side by side.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont

from lipsync.config import BLENDS
from lipsync.demo import build_demo_package
from lipsync.engine import blending
from lipsync.engine.audio import feature_window
from lipsync.engine.blending import FEATHER, HARD
from lipsync.engine.compositor import composite_crop, face_in_crop
from lipsync.engine.geometry import BORDER
from lipsync.engine.jpeg import encode_jpeg
from lipsync.engine.package import ModelPackage
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.runtime import run_torch
from lipsync.engine.video import decode_videos, for_each_frame
from lipsync.quality.seam import mean_seam, seam_score

UInt8 = npt.NDArray[np.uint8]

RUNS, RUN = 4, 10
"""Runs of neighbouring frames, spread over the video, and their length."""
CAST = (6, -4, -4)
"""Levels of red, green and blue."""
WIDTHS = (4, 8, 12, 16, 20, 24, 32)
ROUNDS = 400
ZOOM = 4
AMPLIFIED = 8
SIDE = 320
"""Pixels of a picture's tile, and of what it shows of the frame's face."""


@dataclass(frozen=True)
class Scene:
    """One frame: its pixels (uint8 RGB), and where its face is."""

    frame: UInt8
    crop: UInt8
    face: UInt8
    rectangle: Rectangle

    def pasted(self, face: UInt8, blend: str) -> UInt8:
        x1, y1, x2, y2 = self.rectangle
        made = self.frame.copy()
        made[y1:y2, x1:x2] = composite_crop(self.crop, face, x2 - x1, y2 - y1, blend=blend)
        return made


def scenes(package: ModelPackage) -> list[Scene]:
    """The network's faces in plain float32, with the package's own features."""
    starts = (package.frame_count * (2 * run + 1) // (2 * RUNS) for run in range(RUNS))
    frame_ids = [start + i for start in starts for i in range(RUN)]
    frames: dict[int, UInt8] = {}
    n_seen = 0

    def keep(frame: UInt8) -> None:
        nonlocal n_seen
        if n_seen in frame_ids:
            frames[n_seen] = frame.copy()
        n_seen += 1

    for_each_frame(package.videos["full_body"], keep)
    crops = decode_videos({"crops_328": package.videos["crops_328"]})["crops_328"].numpy()
    plan, ops = InferencePlan[torch.Tensor](package.network), TorchOps(torch.device("cpu"), torch.float32)
    made = []
    for i in frame_ids:
        window = feature_window(package.features, i, package.window_rows).reshape(1, *package.window_shape)
        shown = torch.from_numpy(crops[i, BORDER:-BORDER, BORDER:-BORDER])
        (face,) = run_torch(plan, ops, shown[None], torch.from_numpy(window))
        x1, y1, x2, y2 = package.rectangles[i].tolist()
        made.append(Scene(frames[i], crops[i].copy(), face, (x1, y1, x2, y2)))
    return made


def networks(package: ModelPackage) -> dict[str, npt.NDArray[np.int16]]:
    """What each network adds to the demo's faces: (320, 320, 3)."""
    size, mask = package.geometry.face_size, package.geometry
    none = np.zeros((size, size, 3), np.int16)
    inside = none.copy()
    inside[slice(*mask.mask_y), slice(*mask.mask_x)] = CAST
    return {"the demo's": none, "with a cast": none + np.array(CAST, np.int16), "cast in the mask": inside}


def changed(face: UInt8, cast: npt.NDArray[np.int16]) -> UInt8:
    return (face + cast).clip(0, 255).astype(np.uint8)


def upper_colours(scene: Scene, face: UInt8, blend: str) -> npt.NDArray[np.float64]:
    """How far mean colours of the upper face are from the crop's, where speech moves nothing: (2, 5, 3), in levels."""
    shown, made = scene.crop, face_in_crop(scene.crop, face, blend=blend)
    difference = (made.astype(np.float64) - shown)[BORDER:-BORDER, BORDER:-BORDER][24:144, 30:-30]
    return difference.reshape(2, 60, 5, 52, 3).mean(axis=(1, 3))


def mask_edge_step(pasted: UInt8, scene: Scene, package: ModelPackage) -> float:
    """The colour step at the mask's edge: of the inset, for a border that ends there."""
    geometry = package.geometry
    crop_size = round(geometry.crop_size * BORDER / (BORDER + geometry.mask_x[0]))
    return seam_score(pasted, scene.frame, scene.rectangle, crop_size=crop_size).inset.colour


def score(found: list[Scene], faces: list[UInt8], blend: str, package: ModelPackage) -> str:
    pasted = [scene.pasted(face, blend) for scene, face in zip(found, faces, strict=True)]
    seam = mean_seam(
        seam_score(frame, scene.frame, scene.rectangle) for frame, scene in zip(pasted, found, strict=True)
    )
    mask = [mask_edge_step(frame, scene, package) for frame, scene in zip(pasted, found, strict=True)]
    colours = np.stack([upper_colours(scene, face, blend) for scene, face in zip(found, faces, strict=True)])
    flicker = np.diff(colours.reshape(RUNS, RUN, -1), axis=1)
    return (
        f"{seam.edge.colour:.2f} | {seam.inset.colour:.2f} | {seam.inset.gradient_ratio:.2f} | "
        f"{np.sqrt(np.square(mask).mean()):.2f} | {np.sqrt(np.square(colours).mean()):.2f} | "
        f"{np.sqrt(np.square(flicker).mean()):.2f}"
    )


def print_scores(found: list[Scene], package: ModelPackage) -> None:
    print(
        "\n| network | blend | step at the rectangle | step at the face | gradient there | step at the mask "
        "| colour off | flicker |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, cast in networks(package).items():
        faces = [changed(scene.face, cast) for scene in found]
        for blend in BLENDS:
            print(f"| {name} | {blend} | {score(found, faces, blend, package)} |")


def print_widths(found: list[Scene], package: ModelPackage) -> None:
    """Where more feather hides no more."""
    taken = blending.FEATHER_PIXELS
    print("\n| feather, pixels | step at the face, with a cast | step at the mask, cast inside |\n| --- | --- | --- |")
    _, everywhere, inside = networks(package).values()
    for width in WIDTHS:
        blending.FEATHER_PIXELS = width
        blending.blend_tables.cache_clear()
        steps, mask_steps = [], []
        for scene in found[::4]:
            pasted = scene.pasted(changed(scene.face, everywhere), FEATHER)
            steps.append(seam_score(pasted, scene.frame, scene.rectangle).inset.colour)
            pasted = scene.pasted(changed(scene.face, inside), FEATHER)
            mask_steps.append(mask_edge_step(pasted, scene, package))
        print(f"| {width} | {np.sqrt(np.square(steps).mean()):.2f} | {np.sqrt(np.square(mask_steps).mean()):.2f} |")
    blending.FEATHER_PIXELS = taken
    blending.blend_tables.cache_clear()


def print_times(found: list[Scene]) -> None:
    """Alternating between blends, frame by frame."""
    spent: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for i in range(ROUNDS):
        scene = found[i % len(found)]
        x1, y1, x2, y2 = scene.rectangle
        for blend in BLENDS:
            start = time.perf_counter()
            picture = composite_crop(scene.crop, scene.face, x2 - x1, y2 - y1, blend=blend)
            composited = time.perf_counter()
            encode_jpeg(picture, 90)
            spent[blend, "composite"].append((composited - start) * 1000)
            spent[blend, "with encoding"].append((time.perf_counter() - start) * 1000)
    print("\n| blend | composite, ms | at the least | and encode, ms | times hard |\n| --- | --- | --- | --- | --- |")
    for blend in BLENDS:
        composite, whole = spent[blend, "composite"], spent[blend, "with encoding"]
        ratio = statistics.median(np.divide(whole, spent[HARD, "with encoding"]))
        print(
            f"| {blend} | {statistics.median(composite):.2f} | {min(composite):.2f} | {statistics.median(whole):.2f} | "
            f"{ratio:.2f} |"
        )


def tile(image: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.NEAREST
    )


def draw(path: Path, scene: Scene, package: ModelPackage) -> None:
    """The whole face, a piece of its border magnified, and its difference from the source, amplified."""
    rows = []
    x1, y1, x2, y2 = scene.rectangle
    margin = (SIDE - (x2 - x1)) // 2
    whole = np.s_[y1 - margin : y1 - margin + SIDE, x1 - margin : x1 - margin + SIDE]
    # Where the border crosses the neck: above it the face, below it the frame.
    part = SIDE // ZOOM
    left = x1 + (x2 - x1) // 5
    neck = np.s_[y2 - part // 2 : y2 - part // 2 + part, left : left + part]
    for name, cast in list(networks(package).items())[:2]:
        face = changed(scene.face, cast)
        made = {blend: scene.pasted(face, blend) for blend in BLENDS}
        if cast.any():
            rows.append((f": {name}", [tile(frame[whole]) for frame in made.values()]))
            rows.append((f": {name}, border x{ZOOM}", [tile(frame[neck]) for frame in made.values()]))
        differences = [128 + AMPLIFIED * (frame.astype(int) - scene.frame) for frame in made.values()]
        rows.append((f": {name}, less the source, x{AMPLIFIED}", [tile(each[whole]) for each in differences]))
    label = 26
    sheet = Image.new("RGB", (len(BLENDS) * SIDE, len(rows) * (SIDE + label)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (what, tiles) in enumerate(rows):
        for j, (blend, each) in enumerate(zip(BLENDS, tiles, strict=True)):
            y = i * (SIDE + label)
            pen.text((j * SIDE + 6, y + 3), f"{blend}{what}", "black", font)
            sheet.paste(each, (j * SIDE, y + label))
    sheet.save(path, quality=60)
    print(f"\nwrote {path}, {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to draw the blends side by side")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Pillow {PIL.__version__}")
    package = ModelPackage.open(build_demo_package())
    found = scenes(package)
    print_scores(found, package)
    print_widths(found, package)
    print_times(found)
    if options.picture:
        draw(options.picture, found[RUN // 2], package)


if __name__ == "__main__":
    main()
