"""Every check of a package: what loading looks at, and what would take too long there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lipsync.engine.audio import SAMPLES_PER_FRAME, read_audio
from lipsync.engine.faults import Fault, listing
from lipsync.engine.package import MANIFEST, ModelPackage
from lipsync.engine.video import DecodingStopped, StopSignal
from lipsync.errors import MediaError, PackageError
from lipsync.making.crops import cut_crop, psnr_db
from lipsync.making.findings import Report, frames
from lipsync.making.manifest import sha256
from lipsync.making.pictures import Progress, VideoFrames
from lipsync.making.rectangles import jumps
from lipsync.making.weights import read_encoder

N_COMPARED = 8
MIN_CROPS_DB = 20.0
"""Between a crop and what the whole frame shows at its place; the wrong place gives less than this."""
MIN_CERTIFIED_DB = 30.0
"""Of the face, in the certificate's median frame."""
SPEECH_OFF_FRAMES = 25


@dataclass(frozen=True)
class Check:
    """One check: its name, and whether it passed; what it found is in the report under codes that begin with it."""

    name: str
    passed: bool


@dataclass
class Validation:
    """The result of all checks.

    Attributes:
        checks: in order; those that could not be made, because an earlier one failed, are not among them.
        package: None if it cannot be opened.
    """

    checks: list[Check] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    package: ModelPackage | None = None

    @property
    def valid(self) -> bool:
        return all(check.passed for check in self.checks)


def validate_package(
    folder: Path, *, quick: bool = False, progress: Progress | None = None, stop: StopSignal | None = None
) -> Validation:
    """Check a package in every way.

    Args:
        folder: the package's.
        quick: leave out what reads all of the files: hashes, and decoding videos to their ends.
        progress: called with a stage, steps done, steps in all.
    Nothing that is wrong with the package is raised: it is in the report. Raises DecodingStopped if `stop` was set.
    """
    validation = Validation()
    _Validator(folder, validation, quick, progress or (lambda stage, done, total: None), stop).run()
    return validation


class _Validator:
    """The checks of one package."""

    def __init__(
        self, folder: Path, validation: Validation, quick: bool, progress: Progress, stop: StopSignal | None
    ) -> None:
        self.folder, self.validation, self.report = folder, validation, validation.report
        self.quick, self.progress, self.stop = quick, progress, stop

    def run(self) -> None:
        self.check("open", self.open)
        package = self.validation.package
        if package is None:
            return
        self.check("manifest", lambda: self.manifest(package))
        if not self.quick:
            self.check("contents", lambda: self.contents(package))
            self.check("frames", lambda: self.frames(package))
        self.check("crops", lambda: self.crops(package))
        self.check("rectangles", lambda: self.rectangles(package))
        self.check("speech", lambda: self.speech(package))
        self.check("audio_encoder", lambda: self.audio_encoder(package))
        self.check("certificate", lambda: self.certificate(package))

    def check(self, name: str, work: Callable[[], None]) -> None:
        if self.stop is not None and self.stop.is_set():
            raise DecodingStopped
        before = len(self.report.errors)
        work()
        self.validation.checks.append(Check(name, len(self.report.errors) == before))

    def open(self) -> None:
        """What loading looks at."""
        try:
            self.validation.package = ModelPackage.open(self.folder, stop=self.stop)
        except PackageError as error:
            for problem in error.problems:
                self.report.error("open", problem.where, problem.found, f"expected {problem.expected}")

    def manifest(self, package: ModelPackage) -> None:
        if not (package.path / MANIFEST).exists():
            done = f"`lipsync package build {package.path.name} -o DIR` makes one with it"
            self.report.info("manifest-none", MANIFEST, "an older package, without hashes and certificate", done)
            return
        known = {MANIFEST, *_strings(package.manifest.get("files"))}
        there = {path.relative_to(package.path).as_posix() for path in package.path.rglob("*") if path.is_file()}
        surplus = sorted(there - known)
        if surplus and package.manifest.get("contents"):
            self.report.info("manifest-surplus", package.path.name, f"not named: {listing(surplus)}", "left alone")

    def contents(self, package: ModelPackage) -> None:
        """Sizes and hashes of all files that the manifest lists."""
        contents = package.manifest.get("contents")
        if not isinstance(contents, dict):
            if contents is not None:
                self.report.error("contents", MANIFEST, '"contents" is no object', "expected files with their hashes")
            return
        for done, (name, entry) in enumerate(contents.items(), 1):
            self.progress("hashes", done - 1, len(contents))
            self.content(package, str(name), entry)
        for name in sorted(set(_strings(package.manifest.get("files"))) - contents.keys()):
            self.report.error("contents", name, "no hash of it in the manifest", "build the package again")

    def content(self, package: ModelPackage, name: str, entry: Any) -> None:
        path = package.path / name
        if not path.resolve().is_relative_to(package.path) or not path.is_file():
            self.report.error("contents", name, "missing", "copy the package again")
            return
        size = entry.get("bytes") if isinstance(entry, dict) else None
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes, the manifest says {size}"
            self.report.error("contents", name, found, "it has changed or was cut short; copy the package again")
        elif sha256(path) != wanted:
            self.report.error("contents", name, "another hash than the manifest's", "it has changed; copy it again")

    def frames(self, package: ModelPackage) -> None:
        """Every frame of the videos that are served can be decoded."""
        for role in ("full_body", "crops_328"):
            info = package.videos[role]
            try:
                reader = VideoFrames(info.path, range(info.frame_count))
                for done, _ in enumerate(reader.check(range(info.frame_count), self.stop), 1):
                    self.progress(role, done, info.frame_count)
            except MediaError as error:
                self.report.error("frames", info.path.name, str(error), "copy the package again, or build it anew")

    def crops(self, package: ModelPackage) -> None:
        """The crops show what the whole frames show at their rectangles."""
        numbers = sorted({int(i) for i in np.linspace(0, package.frame_count - 1, N_COMPARED).round()})
        if self.quick:
            numbers = numbers[:1]
        every = range(package.frame_count)
        whole = VideoFrames(package.videos["full_body"].path, every).read(numbers, self.stop)
        crops = VideoFrames(package.videos["crops_328"].path, every).read(numbers, self.stop)
        off = {}
        try:
            for number, picture, crop in zip(numbers, whole, crops, strict=True):
                x1, y1, x2, y2 = (int(corner) for corner in package.rectangles[number])
                off[number] = psnr_db(cut_crop(picture, (x1, y1, x2, y2), package.geometry.crop_size), crop)
        except MediaError as error:
            self.report.error("crops", "videos", str(error), "copy the package again, or build it anew")
            return
        wrong = {number: db for number, db in off.items() if db < MIN_CROPS_DB}
        if wrong:
            found = f"{frames(wrong)}: the crop is not what the frame shows there ({min(wrong.values()):.1f} dB)"
            self.report.error("crops", "crops_328", found, "rectangles and videos are of different frames; build anew")

    def rectangles(self, package: ModelPackage) -> None:
        found = jumps([(int(a), int(b), int(c), int(d)) for a, b, c, d in package.rectangles])
        if found:
            done = "look whether the face is in its place there"
            self.report.warning("rectangles-jump", "rectangles", f"the crop jumps at {frames(found)}", done)

    def speech(self, package: ModelPackage) -> None:
        if package.speech is None:
            self.report.info("speech-none", "speech", "no recording in it", "only the package's own features move lips")
            return
        try:
            n_samples = len(read_audio(package.speech))
        except MediaError as error:
            self.report.error("speech", package.speech.name, str(error), "copy the package again, or build it anew")
            return
        off = n_samples / SAMPLES_PER_FRAME - package.frame_count
        if abs(off) > SPEECH_OFF_FRAMES:
            found = f"{abs(off):.0f} frames {'longer' if off > 0 else 'shorter'} than the video"
            self.report.warning("speech-length", package.speech.name, found, "look whether it belongs to the video")

    def audio_encoder(self, package: ModelPackage) -> None:
        if package.audio_encoder is None:
            if package.front_end.name == "ave":
                done = "live audio needs one: add audio_encoder.safetensors, or give the server one"
                self.report.info("audio_encoder-none", "audio_encoder", "no audio encoder in it", done)
            return
        try:
            read_encoder(package.audio_encoder)
        except Fault as fault:
            name = package.audio_encoder.name
            self.report.error("audio_encoder", name, fault.found, f"expected {fault.expected}")
        except OSError as error:
            name = package.audio_encoder.name
            self.report.error("audio_encoder", name, f"cannot be read ({error.strerror})", "make it readable")

    def certificate(self, package: ModelPackage) -> None:
        certificate = package.manifest.get("certificate")
        if certificate is None:
            done = "`lipsync package build` measures one"
            self.report.info("certificate-none", MANIFEST, "no parity certificate", done)
            return
        try:
            rows = [(int(row["frame"]), float(row["face_psnr_db"])) for row in certificate["frames"]]
            middle = float(np.median([db for _, db in rows]))
            strays = [number for number, _ in rows if not 0 <= number < package.frame_count]
        except (KeyError, TypeError, ValueError):
            self.report.error("certificate", MANIFEST, "the certificate cannot be read", "build the package again")
            return
        if strays or not rows:
            self.report.error("certificate", MANIFEST, "it measured frames that are not there", "build it again")
        elif middle < MIN_CERTIFIED_DB:
            found = f"the face is {middle:.1f} dB from the recipe's (median)"
            self.report.error("certificate", MANIFEST, found, f"expected at least {MIN_CERTIFIED_DB:.0f} dB")


def _strings(files: object) -> list[str]:
    return [value for value in files.values() if isinstance(value, str)] if isinstance(files, dict) else []
