"""A source looked through, before anything is written: a report of all that was found, and a plan of what to build.

Frames, landmarks and feature rows belong together by their number. What can be made good is, and the report says how:
a missing picture is held from the frame before, a missing rectangle is put between its neighbours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from lipsync.engine.audio import SAMPLES_PER_FRAME, VIDEO_FPS, AudioEncoder
from lipsync.engine.faults import Fault, printable
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.manifest import FPS_TOLERANCE
from lipsync.engine.package import MAX_FEATURE_ROWS_OFF, find_parts
from lipsync.engine.unet import UNet
from lipsync.engine.video import StopSignal
from lipsync.errors import MediaError
from lipsync.making.findings import Report
from lipsync.making.frames import SourceFrames
from lipsync.making.pictures import Progress, VideoFrames, scan_video
from lipsync.making.plan import FrameRef, Plan
from lipsync.making.rectangles import choose_refs
from lipsync.making.sound import Int16, SourceSound
from lipsync.making.source import IMAGES_FOLDER, Source, SourceOptions, describe_candidates, latest_epoch
from lipsync.making.weights import read_encoder, read_network


def look_through(
    source: Source, options: SourceOptions, *, progress: Progress | None = None, stop: StopSignal | None = None
) -> tuple[Report, Plan | None]:
    """Look through a source. The plan is None if the report holds errors. Raises DecodingStopped if `stop` is set."""
    looking = _Preflight(source, options, progress or (lambda stage, done, total: None), stop)
    return looking.report, looking.run()


class _Preflight:
    """One source being looked through: what was found of it so far."""

    def __init__(self, source: Source, options: SourceOptions, progress: Progress, stop: StopSignal | None) -> None:
        self.source, self.options = source, options
        self.progress, self.stop = progress, stop
        self.report = Report()
        self.network: UNet | None = None
        self.network_state: dict[str, Tensor] = {}
        self.checkpoint: Path | None = None
        self.encoder: AudioEncoder | None = None
        self.encoder_state: dict[str, Tensor] | None = None
        self.dropped: list[str] = []

    def run(self) -> Plan | None:
        self.look_at_network()
        self.look_at_encoder()
        shown = SourceFrames(self.source, self.options, self.report, self.progress, self.stop)
        shown.look()
        sound = SourceSound(self.source, self.options, self.report, self.progress, self.network, self.encoder)
        sound.look()
        if self.report.errors or shown.size is None:
            return None
        sound.check_duration(shown.count)
        numbers = self.choose_numbers(shown, sound)
        if self.report.errors:
            return None
        refs = choose_refs(numbers, shown.rectangles, shown.lost, shown.size, self.report)
        self.look_at_size(*shown.size)
        plan = self.plan(shown, sound, refs, numbers)
        return None if self.report.errors else plan

    def plan(self, shown: SourceFrames, sound: SourceSound, refs: tuple[FrameRef, ...], numbers: range) -> Plan:
        assert shown.pictures is not None and shown.size is not None and sound.features is not None
        assert sound.front_end is not None and self.network is not None and self.checkpoint is not None
        width, height = shown.size
        geometry = GEOMETRIES[self.network.config.face_size]
        crops, copies = self.old_videos(shown, numbers, geometry.crop_size)
        return Plan(
            source=self.source,
            options=self.options,
            pictures=shown.pictures,
            crops=crops,
            refs=refs,
            width=width,
            height=height,
            padded=(width + width % 2, height + height % 2),
            features=np.ascontiguousarray(sound.features[numbers.start : numbers.stop + MAX_FEATURE_ROWS_OFF]),
            front_end=sound.front_end,
            network=self.network,
            network_state=self.network_state,
            geometry=geometry,
            checkpoint=self.checkpoint,
            encoder_state=self.encoder_state,
            speech=_cut(sound.samples, numbers),
            idle=sound.idle(numbers.start, numbers.stop, shown.count),
            copies=copies,
            dropped=(*sound.dropped, *self.dropped),
            report=self.report,
        )

    def look_at_network(self) -> None:
        candidates = self.source.checkpoints
        path = latest_epoch(candidates)
        if path is None:
            code = "checkpoint-several" if candidates else "checkpoint-missing"
            found = f"{len(candidates)} files fit: {describe_candidates(candidates)}" if candidates else "no network"
            self.report.error(code, "checkpoint", found, "name one with --checkpoint")
            return
        if len(candidates) > 1:
            done = f"the latest is taken: {printable(path.name)}"
            self.report.info("checkpoint-latest", "checkpoint", f"{len(candidates)} epochs", done)
        try:
            self.network, self.network_state = read_network(path)
            self.checkpoint = path
        except (Fault, OSError) as error:
            done = f"give {error.expected}" if isinstance(error, Fault) else "make it readable"
            self.report.error("checkpoint-unusable", printable(path.name), _found(error), done)

    def look_at_encoder(self) -> None:
        path = self.source.audio_encoder
        if path is None:
            return
        try:
            self.encoder, self.encoder_state = read_encoder(path)
        except (Fault, OSError) as error:
            add = self.report.error if self.options.audio_encoder else self.report.warning
            done = "give another with --audio-encoder" if self.options.audio_encoder else "it is left out"
            add("encoder-unusable", printable(path.name), _found(error), done)

    def choose_numbers(self, shown: SourceFrames, sound: SourceSound) -> range:
        """Which of the source's frames the package gets: all that have a picture and a feature row, or as asked."""
        first, end = shown.first, sound.fit_rows(shown.count)
        if first > 0:
            done = f"the package begins with frame {first}"
            self.report.warning("frames-cut", IMAGES_FOLDER, f"no picture for frames before {first}", done)
        asked = self.options.frames
        if asked is None:
            if (first, end) != (0, shown.count):
                self.dropped.append(f"frames outside of {first}:{end}")
            return range(first, end)
        if not first <= asked[0] < asked[1] <= end:
            found = f"--frames {asked[0]}:{asked[1]} of frames {first}:{end}"
            self.report.error("frames-range", "--frames", found, "choose a range within these")
        else:
            found = f"{asked[1] - asked[0]} of {end - first} frames"
            self.report.info("frames-chosen", "--frames", found, "the others are left out, as asked")
            self.dropped.append(f"frames outside of {asked[0]}:{asked[1]}, as asked")
        return range(*asked)

    def look_at_size(self, width: int, height: int) -> None:
        if width % 2 or height % 2:
            sides = " and ".join(side for side, odd in (("a column", width % 2), ("a row", height % 2)) if odd)
            done = f"{sides} is added at the end, a copy of the last: {width + width % 2}x{height + height % 2}"
            self.report.warning("size-odd", "frames", f"{width}x{height}; H.264 takes even sizes alone", done)

    # An older package's videos

    def old_videos(
        self, shown: SourceFrames, numbers: range, crop_size: int
    ) -> tuple[VideoFrames | None, dict[str, Path]]:
        """An older package's crops, if they are of use, and those of its videos that can stay as they are, by role."""
        if self.source.kind != "package":
            return None, {}
        assert self.source.video is not None and shown.size is not None
        crops = self.usable_crops(shown, crop_size)
        copies = {}
        even = not (shown.size[0] % 2 or shown.size[1] % 2)
        if numbers == range(shown.count) and shown.at_25_fps and even and self.source.video.suffix.lower() == ".mp4":
            copies["full_body"] = self.source.video
            if crops is not None:
                copies["crops_328"] = crops.path
        done = f"copied as they are: {' and '.join(copies)}" if copies else "written anew"
        self.report.info("package-videos", "videos", f"{shown.count} frames, crops of {crop_size}", done)
        there = find_parts(self.source.path)[1]
        left = [role for role in ("model_inputs", "rois_320", "landmarks") if role in there]
        if left:
            self.report.info("package-left-out", "videos", ", ".join(left), "left out: frames are made without them")
        return crops, copies

    def usable_crops(self, shown: SourceFrames, crop_size: int) -> VideoFrames | None:
        """The crops that are there, if they are of the network's size, and as many as there are frames."""
        path, found = self.source.crops, "no video of face crops"
        if path is not None:
            try:
                times = scan_video(path, self.stop)
                n = len(times.times_s)
                steady = times.at_25_fps and abs(times.fps - VIDEO_FPS) <= FPS_TOLERANCE
                if (times.width, times.height) == (crop_size, crop_size) and n == shown.count and steady:
                    return VideoFrames(path, range(n))
                found = (
                    f"{n} crops of {times.width}x{times.height} at {times.fps:.6g} a second; "
                    f"expected {shown.count} of {crop_size}x{crop_size} at {VIDEO_FPS}"
                )
            except MediaError as error:
                found = str(error)
        self.report.warning("package-crops", "crops", found, "they are cut anew from the whole frames")
        return None


def _cut(samples: Int16 | None, numbers: range) -> Int16 | None:
    """The sound of some frames; None if there is none."""
    if samples is None:
        return None
    part = samples[numbers.start * SAMPLES_PER_FRAME : numbers.stop * SAMPLES_PER_FRAME]
    return part if len(part) else None


def _found(error: Fault | OSError) -> str:
    return error.found if isinstance(error, Fault) else f"cannot be read ({error.strerror})"
