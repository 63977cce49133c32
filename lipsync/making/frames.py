"""A source's frames and their landmarks, looked at: which can be read, how large they are, where their faces lie."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lipsync.engine.audio import VIDEO_FPS
from lipsync.engine.faults import Fault, listing, printable, read_json
from lipsync.engine.manifest import FPS_TOLERANCE
from lipsync.engine.package import MAX_RECTANGLES_BYTES
from lipsync.engine.rectangles import Rectangle, parse_rectangles
from lipsync.engine.video import MAX_FRAMES, DecodingStopped, StopSignal
from lipsync.errors import MediaError
from lipsync.making.findings import Report, frames
from lipsync.making.landmarks import read_rectangle
from lipsync.making.pictures import (
    N_READERS,
    ImageFrames,
    Pictures,
    Progress,
    VideoFrames,
    VideoTimes,
    check_image,
    scan_video,
)
from lipsync.making.source import IMAGES_FOLDER, LANDMARKS_FOLDER, Source, SourceOptions


class SourceFrames:
    """The frames of one source, by number.

    Attributes:
        pictures: None if there are none.
        size: width and height of a frame.
        count: frames that the source has, those that cannot be read among them.
        first: the first one that can be read.
        lost: those between first and last that have no picture.
        at_25_fps: whether they are a video's that can stay as it is.
        rectangles: as the recipe takes them from the landmarks, where it can.
    """

    def __init__(
        self, source: Source, options: SourceOptions, report: Report, progress: Progress, stop: StopSignal | None
    ) -> None:
        self.source, self.options, self.report = source, options, report
        self.progress, self.stop = progress, stop
        self.pictures: Pictures | None = None
        self.size: tuple[int, int] | None = None
        self.count = self.first = 0
        self.lost: set[int] = set()
        self.at_25_fps = False
        self.rectangles: dict[int, Rectangle] = {}

    def look(self) -> None:
        if self.source.video is not None:
            self.look_at_video(self.source.video)
        elif self.source.images:
            self.look_at_images()
        else:
            self.report.error("frames-missing", "full_body", "no video of whole frames", "give one")
        if self.pictures is not None:
            if self.source.kind == "package":
                self.read_rectangles()
            else:
                self.read_landmarks()

    def wanted(self, number: int) -> bool:
        """Whether a frame of the source is asked for; nothing is said of others."""
        return self.options.frames is None or self.options.frames[0] <= number < self.options.frames[1]

    def check_stop(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise DecodingStopped

    def look_at_images(self) -> None:
        images, landmarks = self.source.images, self.source.landmarks
        if self.source.strays:
            names = listing([printable(name) for name in self.source.strays])
            found = f"no frames by their names: {names}"
            self.report.info("images-stray", IMAGES_FOLDER, found, "they are left alone")
        if min(images) == 1 and 0 not in landmarks:
            found = "numbered from 1 (there is no frame 0, nor landmarks for it)"
            self.report.warning("images-from-one", IMAGES_FOLDER, found, "frame 1 is taken for the first, with row 0")
            images = {number - 1: path for number, path in images.items()}
            landmarks = {number - 1: path for number, path in landmarks.items()}
        if max(images) >= MAX_FRAMES:
            found = f"frames up to {max(images)}"
            self.report.error("frames-too-many", IMAGES_FOLDER, found, f"give at most {MAX_FRAMES}, numbered from 0")
            return
        self.source = replace(self.source, images=images, landmarks=landmarks)
        sizes = self.check_images(images)
        self.first = min(sizes, default=0)
        self.count = max(images) + 1
        holes = set(range(min(images), max(images))) - images.keys()
        self.lost |= holes
        holes = {number for number in holes if self.wanted(number)}
        if holes:
            found = f"no image for {frames(holes)}"
            self.report.warning("images-missing", IMAGES_FOLDER, found, "the frame before is shown again")
        self.check_sizes({number: size for number, size in sizes.items() if self.wanted(number)})
        self.pictures = ImageFrames(images)

    def check_images(self, images: dict[int, Path]) -> dict[int, tuple[int, int]]:
        """Width and height of every image that can be read."""
        sizes: dict[int, tuple[int, int]] = {}
        unreadable: dict[int, str] = {}

        def check(item: tuple[int, Path]) -> None:
            self.check_stop()
            try:
                sizes[item[0]] = check_image(item[1])
            except MediaError as error:
                unreadable[item[0]] = str(error)

        with ThreadPoolExecutor(N_READERS, "look") as readers:
            for done, _ in enumerate(readers.map(check, images.items()), 1):
                self.progress("images", done, len(images))
        self.lost |= unreadable.keys()
        unreadable = {number: told for number, told in unreadable.items() if self.wanted(number)}
        if unreadable:
            found = f"{frames(unreadable)}: {unreadable[min(unreadable)]}"
            self.report.warning("images-unreadable", IMAGES_FOLDER, found, "the frame before is shown again")
        return sizes

    def check_sizes(self, sizes: dict[int, tuple[int, int]]) -> None:
        if not sizes:
            self.report.error("images-missing", IMAGES_FOLDER, "no image that can be read", "extract the frames again")
            return
        kinds: dict[tuple[int, int], list[int]] = {}
        for number, size in sorted(sizes.items()):
            kinds.setdefault(size, []).append(number)
        self.size = max(kinds, key=lambda size: len(kinds[size]))
        others = [number for size, numbers in kinds.items() if size != self.size for number in numbers]
        if others:
            w, h = sizes[others[0]]
            found = f"{frames(others)} of another size: {w}x{h}, the others {self.size[0]}x{self.size[1]}"
            done = "extract them at one size, or leave them out with --frames"
            self.report.error("images-of-several-sizes", IMAGES_FOLDER, found, done)

    def look_at_video(self, path: Path) -> None:
        where = printable(path.name)
        try:
            times = scan_video(path, self.stop)
            picks = times.picks()
            next(VideoFrames(path, picks).read([0], self.stop))
        except MediaError as error:
            self.report.error("video-unreadable", where, str(error).removeprefix(f"{path.name}: "), "export it again")
            return
        self.at_25_fps = times.at_25_fps and abs(times.fps - VIDEO_FPS) <= FPS_TOLERANCE
        self.size, self.count = (times.width, times.height), len(picks)
        self.pictures = VideoFrames(path, picks)
        self.report_rate(where, times, picks)
        if self.source.landmarks:
            self.number_landmarks(times, picks)

    def report_rate(self, where: str, times: VideoTimes, picks: list[int]) -> None:
        if times.at_25_fps:
            return
        left_out, repeated = len(times.times_s) - len(set(picks)), len(picks) - len(set(picks))
        rate = f"{times.fps:.6g} frames a second" if times.steady else f"a variable rate, {times.fps:.4g} on average"
        done = (
            f"{len(picks)} frames at {VIDEO_FPS} a second are taken by their times: of {len(times.times_s)}, "
            f"{left_out} are left out and {repeated} shown again"
        )
        code = "video-other-rate" if times.steady else "video-variable-rate"
        self.report.warning(code, where, rate, done)

    def number_landmarks(self, times: VideoTimes, picks: list[int]) -> None:
        """Landmarks are numbered as the video's frames are, or as those at 25 a second; their count says which."""
        landmarks, n_video = self.source.landmarks, len(times.times_s)
        if len(picks) == n_video or times.at_25_fps:
            return
        n = max(landmarks) + 1
        if abs(n - n_video) < abs(n - len(picks)):
            chosen = {k: landmarks[j] for k, j in enumerate(picks) if j in landmarks}
            self.source = replace(self.source, landmarks=chosen)
            found, done = f"{n} for {n_video} frames of the video", "each goes with the frame that it was made for"
        else:
            found, done = f"{n} for {len(picks)} frames at {VIDEO_FPS} a second", "they are taken as numbered at that"
        self.report.info("landmarks-numbering", LANDMARKS_FOLDER, found, done)

    def read_landmarks(self) -> None:
        landmarks, numbers = self.source.landmarks, range(self.count)
        if not landmarks:
            found = "no .lms files" if self.options.landmarks else f"no {LANDMARKS_FOLDER}/ with .lms files"
            self.report.error("landmarks-missing", LANDMARKS_FOLDER, found, "name their folder with --landmarks")
            return
        surplus = sorted(landmarks.keys() - set(numbers))
        if surplus:
            found = f"{len(surplus)} for frames that are not there: {frames(surplus)}"
            self.report.info("landmarks-surplus", LANDMARKS_FOLDER, found, "they are left alone")
        faults: dict[int, str] = {}
        for done, (number, path) in enumerate(landmarks.items(), 1):
            self.check_stop()
            if number < self.count and self.wanted(number):
                self.read_landmark(number, path, faults)
            self.progress("landmarks", done, len(landmarks))
        if faults:
            found = f"{frames(faults)}: {faults[min(faults)]}"
            self.report.warning("landmarks-unusable", LANDMARKS_FOLDER, found, "counted as missing")

    def read_landmark(self, number: int, path: Path, faults: dict[int, str]) -> None:
        try:
            self.rectangles[number] = read_rectangle(path)
        except Fault as fault:
            faults[number] = f"{fault.found}; expected {fault.expected}"
        except OSError as error:
            faults[number] = f"cannot be read ({error.strerror})"

    def read_rectangles(self) -> None:
        path = self.source.rectangles
        if path is None:
            self.report.error("rectangles-missing", "rectangles", "no crop rectangles", "add crop_rectangles.json")
            return
        try:
            self.rectangles = parse_rectangles(read_json(path, MAX_RECTANGLES_BYTES))
        except Fault as fault:
            self.report.error("rectangles-unusable", path.name, fault.found, f"give {fault.expected}")
        except OSError as error:
            self.report.error(
                "rectangles-unusable", path.name, f"cannot be read ({error.strerror})", "make it readable"
            )
