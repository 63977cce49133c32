"""What whole frames show, composed as they are served, beside the source's: likeness of the mouth, and the seam."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipsync.engine.compositor import composite_frame
from lipsync.engine.package import ModelPackage
from lipsync.engine.rectangles import Rectangle
from lipsync.quality.criteria import Score
from lipsync.quality.faces import MadeFaces
from lipsync.quality.samples import Progress, Samples, for_frames
from lipsync.quality.seam import SeamScore, mean_seam, seam_score
from lipsync.quality.similarity import WINDOW, psnr_db, squared_error, ssim

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Compared:
    """One frame with its face beside the source's: the mouth's region, and the paste's border."""

    squared_error: float
    ssim: float | None
    seam: SeamScore


def appearance_scores(package: ModelPackage, samples: Samples, made: MadeFaces, progress: Progress) -> list[Score]:
    """Likeness and seam of the faces with their own speech. Raises MediaError if whole frames cannot be decoded."""
    frame_ids: list[int] = samples.frame_ids.tolist()
    compared: list[_Compared] = []

    def compare(index: int, source: UInt8) -> None:
        x1, y1, x2, y2 = package.rectangles[frame_ids[index]].tolist()
        frame = _whole_frame(source, samples, made, index, (x1, y1, x2, y2))
        compared.append(_compare(frame, source, (x1, y1, x2, y2), package, samples))
        progress("comparing frames", len(compared), len(frame_ids))

    for_frames(package.videos["full_body"], frame_ids, compare)
    structure = [one.ssim for one in compared if one.ssim is not None]
    too_small = "" if structure else f"the mouth is smaller than {WINDOW} pixels"
    seam = mean_seam(one.seam for one in compared)
    return [
        Score("mouth_psnr", psnr_db(float(np.mean([one.squared_error for one in compared])))),
        Score("mouth_ssim", float(np.mean(structure)) if structure else None, too_small),
        Score("seam_gradient", seam.gradient_ratio, _both(seam.edge.gradient_ratio, seam.inset.gradient_ratio)),
        Score("seam_colour", seam.colour_step, _both(seam.edge.colour, seam.inset.colour)),
    ]


def _both(edge: float, inset: float) -> str:
    return f"crop's edge {edge:.2f}, face's {inset:.2f}"


def _whole_frame(source: UInt8, samples: Samples, made: MadeFaces, index: int, rectangle: Rectangle) -> UInt8:
    """The frame as it would be served, before JPEG."""
    own = made.own
    if own.crops is None:
        whole = composite_frame(source, samples.crops[index], own.faces[index], rectangle, blend=made.blend)
        return np.asarray(whole)
    x1, y1, x2, y2 = rectangle
    frame = source.copy()
    frame[y1:y2, x1:x2] = own.crops[index]
    return frame


def _compare(frame: UInt8, source: UInt8, rectangle: Rectangle, package: ModelPackage, samples: Samples) -> _Compared:
    mouth = samples.region.in_frame(rectangle, package.geometry)
    a, b = frame[mouth], source[mouth]
    return _Compared(
        squared_error(a, b),
        ssim(a, b) if min(a.shape[:2]) >= WINDOW else None,
        seam_score(frame, source, rectangle, crop_size=package.geometry.crop_size),
    )
