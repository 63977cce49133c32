"""What kind of source a folder or a video is, and where its parts are. Nothing is read yet but names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lipsync.engine.audio import FRONT_ENDS
from lipsync.engine.faults import listing, printable
from lipsync.engine.package import MANIFEST, OLD_MANIFEST, find_parts
from lipsync.errors import PackageError, PackageProblem

Kind = Literal["training folder", "video", "package"]

IMAGES_FOLDER, LANDMARKS_FOLDER = "full_body_img", "landmarks"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".webm")
WEIGHTS_SUFFIXES = (".pth", ".safetensors")
SPEECH_NAMES = ("aud.wav", "speech.wav")
ENCODER = re.compile(r"(audio_visual_encoder|audio_encoder.*|ave_encoder)\.(pth|safetensors)", re.IGNORECASE)
ENCODER_FOLDERS = ("", "checkpoint", "checkpoints", "model/checkpoints", "audio")
"""Where the recipes keep the audio encoder, seen from the training folder or from one of the two folders above it."""
NUMBERED = re.compile(r"\d{1,9}")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the user says about a source: where parts are that are not found, and what of it is wanted.

    Attributes:
        name: the person's; the source's own by default.
        landmarks: a folder of .lms files.
        features: the feature file.
        audio: the recording that goes with the frames.
        checkpoint: the network's file of weights, or a folder of epochs.
        audio_encoder: its file of weights.
        frames: [first, end) of the source's frames; all by default.
        idle: [first, end) ranges in the package's frames; None to take them from the recording.
        certificate_frames: how many frames the certificate measures; 0 for no certificate.
        background_crf: x264's rate factor for the whole frames.
    """

    name: str | None = None
    landmarks: Path | None = None
    features: Path | None = None
    audio: Path | None = None
    checkpoint: Path | None = None
    audio_encoder: Path | None = None
    frames: tuple[int, int] | None = None
    idle: tuple[tuple[int, int], ...] | None = None
    certificate_frames: int = 8
    background_crf: int = 18

    @property
    def paths(self) -> list[Path]:
        """The files and folders that are named."""
        named = (self.landmarks, self.features, self.audio, self.checkpoint, self.audio_encoder)
        return [path for path in named if path is not None]


@dataclass(frozen=True)
class Source:
    """Where the parts of a source are.

    Attributes:
        kind: a folder as training leaves it, a video with landmarks, or an older package.
        path: as given.
        name: of the person.
        images: by frame number; empty if the frames are a video's.
        strays: names in the folder of images that are no frames.
        video: the whole frames' video, if they are one.
        crops: an older package's video of face crops.
        landmarks: files by frame number.
        rectangles: an older package's crop rectangles.
        features: feature files, by front end.
        speech: the recording; may be the video itself.
        checkpoints: files of weights for the network that fit equally well: one, or epochs.
        audio_encoder: its file of weights.
    """

    kind: Kind
    path: Path
    name: str
    images: dict[int, Path] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    video: Path | None = None
    crops: Path | None = None
    landmarks: dict[int, Path] = field(default_factory=dict)
    rectangles: Path | None = None
    features: dict[str, Path] = field(default_factory=dict)
    speech: Path | None = None
    checkpoints: tuple[Path, ...] = ()
    audio_encoder: Path | None = None


def find_source(path: Path, options: SourceOptions) -> Source:
    """Recognise a source and find its parts. Raises PackageError if it is none, or a named part is not there."""
    _check_named(path, options)
    path = path.resolve()
    name = options.name or path.name
    if path.is_file():
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            raise _no_source(path, "it is a file, and no video by its name")
        folder = path.parent
        found = Source("video", path, options.name or path.stem, video=path)
        return _with_parts(found, folder, folder / LANDMARKS_FOLDER, options)
    if (path / OLD_MANIFEST).exists() or (path / MANIFEST).exists():
        return _older_package(path, options)
    for folder in (path / IMAGES_FOLDER, path):
        images, strays = numbered_files(folder, IMAGE_SUFFIXES)
        if images:
            found = Source("training folder", path, name, images=images, strays=strays if folder != path else ())
            root = path if folder != path or (path / LANDMARKS_FOLDER).is_dir() else path.parent
            return _with_parts(found, root, root / LANDMARKS_FOLDER, options)
    if {"full_body", "crops_328"} <= _parts(path).keys():
        return _older_package(path, options)
    raise _no_source(path, f"neither numbered images in {IMAGES_FOLDER}/ nor a package's videos are in it")


def numbered_files(folder: Path, suffixes: Sequence[str]) -> tuple[dict[int, Path], tuple[str, ...]]:
    """The files of a folder that are called by a number, by that number; and the names of the others.

    Of two that have the same number, the one without leading zeros counts.
    """
    found: dict[int, Path] = {}
    strays = []
    for name in sorted(_names(folder), key=lambda name: (len(name), name)):
        stem, suffix = os.path.splitext(name)
        fits = suffix.lower() in suffixes and NUMBERED.fullmatch(stem) and stem.isascii()
        if fits and int(stem) not in found and (folder / name).is_file():
            found[int(stem)] = folder / name
        elif not name.startswith("."):
            strays.append(name)
    return dict(sorted(found.items())), tuple(strays)


def latest_epoch(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the highest number for a name; the only one, whatever its name; None if it cannot be told."""
    if len(checkpoints) == 1:
        return checkpoints[0]
    if not checkpoints or not all(NUMBERED.fullmatch(path.stem) for path in checkpoints):
        return None
    return max(checkpoints, key=lambda path: (int(path.stem), path.suffix == ".safetensors"))


def _check_named(path: Path, options: SourceOptions) -> None:
    named = {"SOURCE": path, "--landmarks": options.landmarks, "--features": options.features, "--audio": options.audio}
    named |= {"--checkpoint": options.checkpoint, "--audio-encoder": options.audio_encoder}
    missing = [
        PackageProblem(option, f"{printable(str(given))} is not there", "a file or folder that exists")
        for option, given in named.items()
        if given is not None and not given.exists()
    ]
    if missing:
        raise PackageError(printable(path.name or str(path)), missing)


def _no_source(path: Path, found: str) -> PackageError:
    expected = (
        f"a training folder ({IMAGES_FOLDER}/0.jpg, {LANDMARKS_FOLDER}/0.lms ...), an older package ({OLD_MANIFEST}), "
        "or a video or a folder of images with --landmarks"
    )
    label = printable(path.name or str(path))
    return PackageError(label, [PackageProblem(label, found, expected)])


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _parts(path: Path) -> dict[str, Path]:
    try:
        return find_parts(path)[1]
    except PackageError:
        return {}


def _older_package(path: Path, options: SourceOptions) -> Source:
    name, parts = find_parts(path)
    features = {_front_end(parts["audio"]): parts["audio"]} if "audio" in parts else {}
    source = Source(
        "package",
        path,
        options.name or name,
        video=parts.get("full_body"),
        crops=parts.get("crops_328"),
        rectangles=parts.get("rectangles"),
        features=features if options.features is None else {"": options.features},
        speech=options.audio or parts.get("speech"),
        checkpoints=_weights(options.checkpoint) if options.checkpoint else _one(parts.get("network")),
        audio_encoder=options.audio_encoder or parts.get("audio_encoder") or _find_encoder(path),
    )
    return source


def _one(path: Path | None) -> tuple[Path, ...]:
    return () if path is None else (path,)


def _with_parts(source: Source, root: Path, landmarks: Path, options: SourceOptions) -> Source:
    """The source with the parts that lie in its training folder, or where the options say."""
    files, _ = numbered_files(options.landmarks or landmarks, (".lms",))
    features = {front_end.name: root / front_end.file_name for front_end in FRONT_ENDS}
    features = {name: path for name, path in features.items() if path.is_file()}
    speech = next((root / name for name in SPEECH_NAMES if (root / name).is_file()), None)
    return Source(
        source.kind,
        source.path,
        source.name,
        images=source.images,
        strays=source.strays,
        video=source.video,
        landmarks=files,
        features=features if options.features is None else {"": options.features},
        speech=options.audio or speech or source.video,
        checkpoints=_weights(options.checkpoint) if options.checkpoint else _find_checkpoints(root, source.name),
        audio_encoder=options.audio_encoder or _find_encoder(root),
    )


def _front_end(path: Path) -> str:
    return next((f.name for f in FRONT_ENDS if f.file_name == path.name), "")


def _weights(path: Path) -> tuple[Path, ...]:
    """The files of weights that a path means: itself, or those in it; an audio encoder is none of them."""
    if path.is_file():
        return (path,)
    files = [path / name for name in sorted(_names(path)) if name.lower().endswith(WEIGHTS_SUFFIXES)]
    return tuple(file for file in files if file.is_file() and not ENCODER.fullmatch(file.name))


def _find_checkpoints(root: Path, name: str) -> tuple[Path, ...]:
    """The network's epochs: in the training folder, or beside it as a checkout of the recipe keeps them."""
    for above in (root, root.parent, root.parent.parent):
        folder = above / "checkpoint"
        people = [folder / person for person in dict.fromkeys((name, root.name))]
        if above == root:
            people.append(folder)
            inside = [folder / each for each in sorted(_names(folder)) if (folder / each).is_dir()]
            people += inside if len(inside) == 1 else []
        for place in people:
            if place.is_dir() and (found := _weights(place)):
                return found
    return ()


def _find_encoder(root: Path) -> Path | None:
    for above in (root, root.parent, root.parent.parent):
        for folder in ENCODER_FOLDERS:
            names = sorted(_names(above / folder))
            fits = [above / folder / name for name in names if ENCODER.fullmatch(name)]
            files = [path for path in fits if path.is_file()]
            if files:
                return files[0]
    return None


def describe_candidates(paths: Sequence[Path]) -> str:
    """File names for a finding."""
    return listing([printable(path.name) for path in paths])
