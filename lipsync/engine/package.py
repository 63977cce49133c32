"""A model package on disk: find its parts, check them, open them.

Nothing in a package is trusted: no file is executed or unpickled, none outside the folder is read, and what a header
claims is held against a limit before memory is allocated for it. Everything wrong is collected, and told at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lipsync.engine.arrays import check_finite, front_end_of, open_array, to_float32
from lipsync.engine.audio import VIDEO_FPS, AudioFrontEnd
from lipsync.engine.checkpoint import check_network_size, read_checkpoint
from lipsync.engine.faults import Fault, brief, json_type, listing, printable, read_json
from lipsync.engine.geometry import BORDER, GEOMETRIES, FaceGeometry
from lipsync.engine.manifest import FPS_TOLERANCE, Ranges, check_claims, parse_idle
from lipsync.engine.opened import Mark, OpenedFile, OpenedFolder
from lipsync.engine.rectangles import check_rectangles, parse_rectangles
from lipsync.engine.unet import UNet, UNetConfig, from_state_dict
from lipsync.engine.video import StopSignal, VideoInfo, probe_video
from lipsync.errors import CheckpointError, MediaError, PackageError, PackageProblem, PermissionDeniedError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

MANIFEST = "package.json"
MANIFEST_FORMAT = "lipsync-package"
MANIFEST_VERSION = 1
OLD_MANIFEST = "package_info.json"

MIB = 1024 * 1024
MAX_MANIFEST_BYTES = MIB
MAX_RECTANGLES_BYTES = 16 * MIB
RECTANGLES_BYTES = 4096
"""Of their file, and RECTANGLE_BYTES more a frame: all of Python stands still while it parses JSON, 0.15 s a MiB."""
RECTANGLE_BYTES = 512
MAX_DECODED_BYTES = 64 * 1024 * MIB
"""All videos together as uint8 RGB."""

MAX_HASHED_BYTES = 256 * MIB
"""Networks up to this size are held against the manifest's hash at every load: a tenth of a second for 50 MB."""

MAX_FEATURE_ROWS_OFF = 2
"""Feature rows may be this many fewer or more than the video's frames."""
MAX_NAME_SHOWN = 200
"""Characters of a file name, which a manifest may make as long as it likes."""
VIDEO_ROLES = ("full_body", "crops_328", "model_inputs", "rois_320")
READ_LATER = (*VIDEO_ROLES, "audio_encoder", "speech")
"""Roles whose files stay open with the package."""
REQUIRED = ("full_body", "crops_328", "audio", "rectangles", "network")


Fingerprint = tuple[tuple[str, Mark], ...]
"""What a package's manifests and role files are, and what is missing or wrong among them: another one, another package.
In no order that means anything; to be compared alone."""


@dataclass(frozen=True)
class _Role:
    """Where a role's file may be. Earlier folders and patterns win over later ones."""

    patterns: tuple[str, ...]
    folders: tuple[str, ...] = ("",)
    excluded: str = ""

    def fits(self, name: str, pattern: str) -> bool:
        name = name.lower()
        return fnmatchcase(name, pattern) and not fnmatchcase(name, self.excluded)


ROLES: Mapping[str, _Role] = MappingProxyType(
    {
        "full_body": _Role(("full_body.mp4", "full_body_video.mp4", "full_body*.mp4"), ("", "videos")),
        "crops_328": _Role(("crops_328.mp4", "crops_328_video.mp4", "crops_*.mp4"), ("", "videos")),
        "model_inputs": _Role(("model_inputs.mp4", "model_inputs_video.mp4", "model_inputs*.mp4"), ("", "videos")),
        "rois_320": _Role(("rois_320.mp4", "rois_320_video.mp4", "rois_*.mp4"), ("", "videos")),
        "audio": _Role(("aud_*.npy",), ("", "cache", "videos", "audio")),
        "rectangles": _Role(("crop_rectangles.json", "crop_rects.json"), ("", "cache")),
        "landmarks": _Role(("landmarks_2d.npy",), ("", "cache")),
        "network": _Role(("*.safetensors", "*.pth"), ("checkpoint", ""), excluded="audio*encoder*"),
        "audio_encoder": _Role(("audio_encoder.safetensors", "audio_encoder.pth"), ("", "checkpoint")),
        "speech": _Role(("speech.wav", "aud.wav"), ("", "audio")),
    }
)


@dataclass(frozen=True, eq=False)
class ModelPackage:
    """A model package whose every part has been checked. Made by `ModelPackage.open`.

    Attributes:
        path: the folder.
        name: of the person: the manifest's, else the folder's.
        videos: by role: full_body and crops_328, and model_inputs and rois_320 where they are. The roles are called so
            at every size.
        frame_count: of each video.
        width, height: of the whole frames, in pixels.
        fps: frames a second.
        rectangles: (frame_count, 4) int32: x1, y1, x2, y2 of each frame's crop in the whole frame, ends exclusive.
        features: (rows, *front_end.row_shape) float32, finite; rows is frame_count give or take 2.
        features_memory_mapped: False if they had to be converted, which takes a copy.
        front_end: what the features are.
        window_shape: of what the network hears: [channels, height, width].
        window_rows: feature rows that make up a window: 16, or 8 at 160 px.
        landmarks: (frame_count, 68, 2) float32, if there.
        network: float32, in eval mode, on the CPU.
        geometry: of the face.
        audio_file: the features' file, inside of the folder.
        audio_encoder: its file, if there. Not read yet.
        speech: a recording that goes with the person, if there. Not read yet.
        idle: stretches of the video in which the person is silent with a closed mouth: [first, end) frames each, in
            order, without overlap. Empty if the manifest names none.
        sizes: bytes of each role's file.
        open_ms: how long checking and opening each role took, in milliseconds; videos are probed, not decoded.
        manifest: package.json or package_info.json as it is; empty if there is neither.
        files: by role, those that are read later, kept open: nobody can put others in their place. Videos are decoded
            from them, whole and for single frames.
        fingerprint: of all of its files, as they were opened.
    """

    path: Path
    name: str
    videos: Mapping[str, VideoInfo]
    frame_count: int
    width: int
    height: int
    fps: float
    rectangles: Int32 = field(repr=False)
    features: Float32 = field(repr=False)
    features_memory_mapped: bool
    front_end: AudioFrontEnd
    window_shape: tuple[int, int, int]
    window_rows: int
    landmarks: Float32 | None = field(repr=False)
    network: UNet = field(repr=False)
    geometry: FaceGeometry
    audio_file: str
    audio_encoder: Path | None
    speech: Path | None
    idle: Ranges
    sizes: Mapping[str, int]
    open_ms: Mapping[str, float] = field(repr=False)
    manifest: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, OpenedFile] = field(repr=False)
    fingerprint: Fingerprint = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        below: str | os.PathLike[str] | None = None,
        map_features: bool = True,
        stop: StopSignal | None = None,
    ) -> ModelPackage:
        """Find, check and open the parts of a package. The videos are probed, not decoded.

        Args:
            path: the package's folder.
            below: a folder that it must really lie in, links followed.
            map_features: leave float32 features on disk, mapped into memory. Whoever cuts that file short ends this
                process (SIGBUS): False takes a copy, for packages that may be written to.
            stop: set from another thread, it ends the work.
        Raises:
            PackageError: lists everything wrong with it. No file is left open.
            PermissionDeniedError: there is no folder of this path below `below`.
            DecodingStopped: `stop` was set.
        """
        opening = _Opening(Path(path), stop, below=below, map_features=map_features)
        try:
            return opening.run()
        finally:
            # A memory map holds its file open, and an exception's traceback holds this object.
            opening.forget()

    def close(self) -> None:
        """Close its files: they cannot be read any more. They close with the package anyway."""
        for file in self.files.values():
            file.close()


def find_fingerprint(path: str | os.PathLike[str], *, below: str | os.PathLike[str] | None = None) -> Fingerprint:
    """What `ModelPackage.fingerprint` would be now; also of a package that cannot be used.

    Raises PackageError if there is no such folder, or nothing in it; PermissionDeniedError as `ModelPackage.open`.
    """
    opening = _Opening(Path(path), None, below=below)
    try:
        opening.check_folder()
        opening.find_files()
        return opening.fingerprint()
    finally:
        opening.forget()


def check_folder(path: str | os.PathLike[str], *, below: str | os.PathLike[str] | None = None) -> Path:
    """Where a package's folder really is. Raises as `find_fingerprint`."""
    opening = _Opening(Path(path), None, below=below)
    try:
        opening.check_folder()
        return opening.path
    finally:
        opening.forget()


def find_parts(path: str | os.PathLike[str]) -> tuple[str, dict[str, Path]]:
    """A package's name, and its files by role, as far as they are found; a role that several fit, or none, is left out.

    Raises PackageError if there is no such folder, or nothing in it.
    """
    opening = _Opening(Path(path), None)
    try:
        opening.check_folder()
        opening.find_files()
        return opening.name, {role: file.path for role, file in opening.files.items()}
    finally:
        opening.forget()


class _Opening:
    """One package being opened: what was found of it so far, and what is wrong with it."""

    def __init__(
        self,
        path: Path,
        stop: StopSignal | None,
        *,
        below: str | os.PathLike[str] | None = None,
        map_features: bool = True,
    ) -> None:
        self.path = path
        self.below = below
        self.map_features = map_features
        self.folder: OpenedFolder | None = None
        self.label = printable(path.absolute().name or str(path), MAX_NAME_SHOWN)
        self.stop = stop
        self.problems: list[PackageProblem] = []
        self.open_ms: dict[str, float] = {}
        self.manifest: Mapping[str, Any] = {}
        self.claims: Mapping[str, Any] = {}  # package.json's alone
        self.idle: Ranges = ()
        self.name = self.label
        self.files: dict[str, OpenedFile] = {}
        self.marks: dict[str, Mark] = {}  # of manifests
        self.videos: dict[str, VideoInfo] = {}
        self.frame_count: int | None = None
        self.rectangles: Int32 | None = None
        self.features: Float32 | None = None
        self.front_end: AudioFrontEnd | None = None
        self.landmarks: Float32 | None = None
        self.network: UNet | None = None

    def run(self) -> ModelPackage:
        self.check_folder()
        self.find_files()
        self.open_videos()
        self.attempt("rectangles", self.open_rectangles)
        self.attempt("audio", self.open_features)
        self.attempt("landmarks", self.open_landmarks)
        self.attempt("network", self.open_network)
        self.check_agreement()
        self.check_claims()
        self.raise_problems()
        return self.result()

    def forget(self) -> None:
        """Close what no package has taken."""
        self.features = self.landmarks = self.network = None
        self.videos = {}
        for file in self.files.values():
            file.close()
        self.files = {}
        if self.folder is not None:
            self.folder.close()

    def report(self, where: str, found: str, expected: str) -> None:
        self.problems.append(PackageProblem(printable(where, MAX_NAME_SHOWN), printable(found), printable(expected)))

    def raise_problems(self) -> None:
        if self.problems:
            raise PackageError(self.label, self.problems)

    def attempt(self, role: str, work: Any) -> None:
        """Open one role's file, if there is one; what is wrong with it becomes a problem."""
        file = self.files.get(role)
        if file is None:
            return
        start = time.perf_counter()
        try:
            work(file)
        except Fault as fault:
            self.report(self.where(role), fault.found, fault.expected)
        except OSError as error:
            self.report(self.where(role), f"cannot be read ({error.strerror or error})", "a readable file")
        self.open_ms[role] = (time.perf_counter() - start) * 1000

    def where(self, role: str) -> str:
        """The role's file, as the package's user knows it."""
        return self.files[role].path.relative_to(self.path).as_posix()

    # Finding

    def check_folder(self) -> None:
        """Everything else needs a folder: without one, that is the only problem."""
        try:
            self.folder = OpenedFolder.open(self.path, below=self.below)
            self.path = self.folder.path
            entries = self.folder.names()
        except (OSError, ValueError) as error:
            if self.below is not None:  # why not, is nobody's business
                raise PermissionDeniedError("there is no package of this path in the folder of models") from None
            if isinstance(error, NotADirectoryError):
                self.report(self.label, "it is a file", "a folder with a model package in it")
            elif isinstance(error, FileNotFoundError):
                self.report(self.label, "there is no such folder", "a folder with a model package in it")
            else:
                reason = getattr(error, "strerror", None) or "not a valid path"
                self.report(self.label, f"the folder cannot be read ({reason})", "a readable folder")
        else:
            if not entries:
                self.report(self.label, "the folder is empty", "a model package: " + ", ".join(REQUIRED))
        self.raise_problems()

    def fingerprint(self) -> Fingerprint:
        """Of what was found."""
        marks = {**self.marks, **{self.where(role): file.mark for role, file in self.files.items()}}
        return (*sorted(marks.items()), *((str(problem), ()) for problem in self.problems))

    def find_files(self) -> None:
        named = self.named_files()
        for role in ROLES:
            try:
                file = self.open_file(named[role]) if role in named else self.search(role)
            except Fault as fault:
                self.report(named.get(role, role), fault.found, fault.expected)
                continue
            if file is not None:
                self.files[role] = file
            elif role in REQUIRED:
                self.report(role, "missing", "a file " + self.looked_for(role))

    def named_files(self) -> dict[str, str]:
        """Relative paths by role, from whichever manifest there is."""
        for file_name, read in ((MANIFEST, self.read_manifest), (OLD_MANIFEST, self.read_old_manifest)):
            if not self.exists(file_name):
                continue
            try:
                with contextlib.closing(self.open_file(file_name)) as file:
                    self.marks[file_name] = file.mark
                    manifest = read_json(file.readable, MAX_MANIFEST_BYTES)
                if not isinstance(manifest, dict):
                    raise Fault(f"a JSON {json_type(manifest)}", "a JSON object")
                self.manifest = manifest
                return read(manifest)
            except Fault as fault:
                self.report(file_name, fault.found, fault.expected)
                return {}
        return {}

    def read_manifest(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        if manifest.get("format") != MANIFEST_FORMAT:
            raise Fault(f'"format" is {brief(manifest.get("format"))}', f'"{MANIFEST_FORMAT}"')
        version = manifest.get("version")
        if version != MANIFEST_VERSION or isinstance(version, bool):
            raise Fault(f'"version" is {brief(version)}', f"{MANIFEST_VERSION}, the only one known")
        self.claims = manifest
        self.take_name(manifest, MANIFEST, "name")
        files = manifest.get("files", {})
        if not isinstance(files, dict):
            raise Fault(f'"files" is a {json_type(files)}', "an object of relative paths by role")
        named = {}
        for role, file in files.items():
            if role not in ROLES:
                self.report(MANIFEST, f'"files" names the unknown role {brief(role)}', "one of " + ", ".join(ROLES))
            elif not isinstance(file, str):
                self.report(MANIFEST, f"the path of {role} is a {json_type(file)}", "a relative path")
            else:
                named[role] = file
        return named

    def read_old_manifest(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        """The older tool names its videos "full_body_img", "crops_328_img" and so on."""
        self.take_name(manifest, OLD_MANIFEST, "dataset_name")
        videos = manifest.get("videos", {})
        if not isinstance(videos, dict):
            raise Fault(f'"videos" is a {json_type(videos)}', "an object of videos by role")
        named = {}
        for key, entry in videos.items():
            role = _role_of(key)
            file = entry.get("video_file") if isinstance(entry, dict) else entry
            if role is None or file is None:
                continue
            if not isinstance(file, str):
                self.report(OLD_MANIFEST, f"the file of {brief(key)} is a {json_type(file)}", "a file name")
                continue
            in_videos = PurePosixPath("videos", file).as_posix()
            named[role] = in_videos if not self.exists(file) and self.exists(in_videos) else file
        return named

    def take_name(self, manifest: Mapping[str, Any], file_name: str, key: str) -> None:
        name = manifest.get(key)
        if isinstance(name, str) and name.strip():
            self.name = printable(name, MAX_NAME_SHOWN)
        elif name is not None:
            self.report(file_name, f'"{key}" is {brief(name)}', "a name")

    def exists(self, relative: str) -> bool:
        assert self.folder is not None
        return self.folder.exists(relative)

    def open_file(self, relative: str) -> OpenedFile:
        """A regular file of the package, by its path in it. Raises Fault."""
        assert self.folder is not None
        return self.folder.file(relative)

    def search(self, role: str) -> OpenedFile | None:
        """The file of a role, by its name. Raises Fault if several fit equally well."""
        for candidates in self.candidates(role):
            chosen = _latest_epoch(candidates) if role == "network" and len(candidates) > 1 else candidates[0]
            if chosen is None or (len(candidates) > 1 and role != "network"):
                raise Fault(
                    f"{len(candidates)} files fit: {listing(candidates)}",
                    f"one; keep one of them, or name it in {MANIFEST}",
                )
            try:
                return self.open_file(chosen)
            except Fault as fault:
                raise Fault(f"{chosen}: {fault.found}", fault.expected) from None
        return None

    def candidates(self, role: str) -> Iterator[list[str]]:
        """Files that fit a role equally well, best first; never an empty list."""
        where = ROLES[role]
        listings = [(folder, self.list_folder(folder)) for folder in where.folders]
        for pattern in where.patterns:
            for folder, names in listings:
                fits = [name for name in names if where.fits(name, pattern)]
                if fits:
                    yield [PurePosixPath(folder, name).as_posix() for name in fits]

    def list_folder(self, folder: str) -> list[str]:
        assert self.folder is not None
        try:
            return self.folder.names(folder)
        except OSError as error:
            self.report(folder, f"the folder cannot be read ({error.strerror})", "a readable folder")
            return []

    def looked_for(self, role: str) -> str:
        where = ROLES[role]
        folders = ["at the top" if not folder else f"in {folder}/" for folder in where.folders]
        return " or ".join(where.patterns) + ", " + " or ".join(folders)

    # Opening

    def open_videos(self) -> None:
        for role in VIDEO_ROLES:
            if role in self.files:
                start = time.perf_counter()
                try:
                    self.videos[role] = probe_video(self.files[role], stop=self.stop)
                    self.open_ms[role] = (time.perf_counter() - start) * 1000
                except MediaError as error:
                    message = str(error).removeprefix(f"{self.files[role].path.name}: ")
                    found, _, expected = message.partition("; expected ")
                    self.report(self.where(role), found, expected or "an MP4 video that decodes to its end")
        self.check_fps()
        self.check_video_sizes()
        self.check_frame_counts()

    def check_fps(self) -> None:
        for role, info in self.videos.items():
            if abs(info.fps - VIDEO_FPS) > FPS_TOLERANCE:
                self.report(self.where(role), f"{info.fps:.6g} frames a second", f"{VIDEO_FPS}")

    def check_video_sizes(self) -> None:
        total = sum(info.decoded_bytes for info in self.videos.values())
        if total > MAX_DECODED_BYTES:
            self.report(
                "videos", f"{total / 2**30:.1f} GiB when decoded", f"at most {MAX_DECODED_BYTES / 2**30:.0f} GiB"
            )
        face = None
        if "crops_328" in self.videos:
            info = self.videos["crops_328"]
            known = {geometry.crop_size: geometry.face_size for geometry in GEOMETRIES.values()}
            face = known.get(info.width) if info.width == info.height else None
            if face is None:
                sizes = " or ".join(f"{size}x{size}" for size in known)
                self.report(self.where("crops_328"), f"{info.width}x{info.height} pixels", sizes)
        for role in ("model_inputs", "rois_320"):
            info_or_none = self.videos.get(role)
            faces = list(GEOMETRIES) if face is None else [face]
            if info_or_none and (info_or_none.width, info_or_none.height) not in [(f, f) for f in faces]:
                self.report(
                    self.where(role),
                    f"{info_or_none.width}x{info_or_none.height} pixels",
                    " or ".join(f"{f}x{f}" for f in faces) + f", the crops less their border of {BORDER}",
                )

    def check_frame_counts(self) -> None:
        counts = {role: info.frame_count for role, info in self.videos.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{self.where(role)} has {count}" for role, count in counts.items())
            self.report("videos", f"their frame counts differ: {found}", "the same number of frames in each")
        self.frame_count = counts.get("full_body", next(iter(counts.values()), None))

    def open_rectangles(self, file: OpenedFile) -> None:
        # Without a video that can be read nobody knows how many there should be: as many as fit into a MiB.
        n_bytes = MIB if self.frame_count is None else RECTANGLES_BYTES + RECTANGLE_BYTES * self.frame_count
        rows = parse_rectangles(read_json(file.readable, min(n_bytes, MAX_RECTANGLES_BYTES)))
        body = self.videos.get("full_body")
        check_rectangles(rows, (body.width, body.height) if body else None)
        if self.frame_count is not None and len(rows) != self.frame_count:
            missing = sorted(set(range(self.frame_count)) - rows.keys())
            without = f", none for frame {listing([str(i) for i in missing])}" if missing else ""
            raise Fault(f"rectangles for {len(rows)} frames{without}", f"one for each of {self.frame_count} frames")
        gaps = sorted(set(range(len(rows))) - rows.keys())
        if gaps:
            raise Fault(f"no rectangle for frame {listing([str(i) for i in gaps])}", "one for every frame")
        self.rectangles = np.array([rows[i] for i in range(len(rows))], np.int32).reshape(-1, 4)

    def open_features(self, file: OpenedFile) -> None:
        array = open_array(file.readable)
        self.front_end, row_shape = front_end_of(array.shape)
        n_rows = len(array)
        if self.frame_count is not None and abs(n_rows - self.frame_count) > MAX_FEATURE_ROWS_OFF:
            raise Fault(
                f"{n_rows} rows of features",
                f"one for each of {self.frame_count} frames, give or take {MAX_FEATURE_ROWS_OFF}",
            )
        check_finite(array)
        mapped = self.map_features and array.dtype == np.float32 and array.dtype.isnative and array.flags.c_contiguous
        self.features = (array if mapped else to_float32(array)).reshape(n_rows, *row_shape)

    def open_landmarks(self, file: OpenedFile) -> None:
        array = open_array(file.readable)
        n = "n" if self.frame_count is None else self.frame_count
        if array.shape[1:] != (68, 2) or (self.frame_count is not None and len(array) != self.frame_count):
            raise Fault(f"landmarks of shape {list(array.shape)}", f"[{n}, 68, 2]")
        check_finite(array)
        self.landmarks = to_float32(array)

    def open_network(self, file: OpenedFile) -> None:
        self.check_hash("network", file)
        checkpoint = read_checkpoint(file.readable, kind=file.path.suffix)
        try:
            check_network_size(checkpoint)
            self.network = from_state_dict(checkpoint)
        except CheckpointError as error:
            raise Fault(str(error), "a state dict of the lip-sync network") from error

    def check_hash(self, role: str, file: OpenedFile) -> None:
        """Hold a file against the manifest's hash, if it names one. Raises Fault."""
        contents = self.claims.get("contents")
        entry = contents.get(self.where(role)) if isinstance(contents, dict) else None
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if wanted is None or file.size_bytes > MAX_HASHED_BYTES:
            return
        with file.readable.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        if found != wanted:
            raise Fault(f"its SHA-256 is {found}", f"{brief(wanted)}, as {MANIFEST} has it; copy the package again")

    def check_agreement(self) -> None:
        """What lies across two files; each is only checked where both could be read."""
        if self.network is None:
            return
        config = self.network.config
        crops = self.videos.get("crops_328")
        size = GEOMETRIES[config.face_size].crop_size
        others = [(g.crop_size, g.crop_size) for g in GEOMETRIES.values() if g.crop_size != size]
        if crops is not None and (crops.width, crops.height) in others:  # crops of no known size are told already
            self.report(
                self.where("network"),
                f"a network for faces of {config.face_size}x{config.face_size} and crops of {size}x{size}, "
                f"but {self.where('crops_328')} is {crops.width}x{crops.height}",
                "network and crops of the same size",
            )
        if self.front_end is not None and self.front_end.name not in config.audio_shapes:
            self.report(
                self.where("audio"),
                f"features of the {self.front_end.name} front end, which the network does not hear",
                " or ".join(config.audio_shapes) + f", for the network's {config.audio_channels} audio channels",
            )

    def check_claims(self) -> None:
        """What the manifest says beside its files. Hashes but the network's are left to `lipsync package
        validate`: they take long."""
        try:
            self.idle = parse_idle(self.claims.get("idle"), self.frame_count)
        except Fault as fault:
            self.report(MANIFEST, fault.found, fault.expected)
        for claim in check_claims(self.claims, self.facts()):
            self.report(MANIFEST, claim.found, claim.expected)

    def facts(self) -> dict[str, object]:
        """What the files say, by the manifest's keys: as much as could be read of them."""
        facts: dict[str, object] = {}
        body = self.videos.get("full_body")
        if body is not None:
            facts |= {"fps": float(body.fps), "size": {"width": body.width, "height": body.height}}
        if self.frame_count is not None:
            facts["frame_count"] = self.frame_count
        if self.network is not None:
            config = self.network.config
            geometry = GEOMETRIES[config.face_size]
            facts["geometry"] = {"face_size": geometry.face_size, "crop_size": geometry.crop_size, "border": BORDER}
            facts["mask"] = {"x": list(geometry.mask_x), "y": list(geometry.mask_y)}
            if self.front_end is not None and self.front_end.name in config.audio_shapes:
                facts["audio"] = {
                    "front_end": self.front_end.name,
                    "window_rows": window_rows(config),
                    "window_shape": list(config.audio_shapes[self.front_end.name]),
                }
        return facts

    def result(self) -> ModelPackage:
        assert self.network is not None and self.front_end is not None
        assert self.rectangles is not None and self.features is not None and self.frame_count is not None
        config = self.network.config
        body = self.videos["full_body"]
        sizes = {role: file.size_bytes for role, file in self.files.items()}
        fingerprint, audio_file = self.fingerprint(), self.where("audio")
        kept = {role: self.files.pop(role) for role in READ_LATER if role in self.files}
        return ModelPackage(
            path=self.path,
            name=self.name,
            videos=MappingProxyType(self.videos),
            frame_count=self.frame_count,
            width=body.width,
            height=body.height,
            fps=body.fps,
            rectangles=self.rectangles,
            features=self.features,
            features_memory_mapped=isinstance(self.features, np.memmap),
            front_end=self.front_end,
            window_shape=config.audio_shapes[self.front_end.name],
            window_rows=window_rows(config),
            landmarks=self.landmarks,
            network=self.network,
            geometry=GEOMETRIES[config.face_size],
            audio_file=audio_file,
            audio_encoder=kept["audio_encoder"].path if "audio_encoder" in kept else None,
            speech=kept["speech"].path if "speech" in kept else None,
            idle=self.idle,
            sizes=MappingProxyType(sizes),
            open_ms=MappingProxyType(self.open_ms),
            manifest=MappingProxyType(dict(self.manifest)),
            files=MappingProxyType(kept),
            fingerprint=fingerprint,
        )


def window_rows(config: UNetConfig) -> int:
    """Feature rows in the network's audio window."""
    return 16 if config.face_size == 320 else 8


def _role_of(key: str) -> str | None:
    """The video role that a key of package_info.json means."""
    prefixes = {"full_body": "full_body", "crops_": "crops_328", "model_inputs": "model_inputs", "rois_": "rois_320"}
    return next((role for prefix, role in prefixes.items() if key.startswith(prefix)), None)


def _latest_epoch(candidates: Sequence[str]) -> str | None:
    """Of checkpoints named by their epoch, the last; None where names are no numbers."""
    epochs = {path: PurePosixPath(path).stem for path in candidates}
    if not all(stem.isascii() and stem.isdigit() and len(stem) < 10 for stem in epochs.values()):
        return None
    return max(candidates, key=lambda path: int(epochs[path]))
