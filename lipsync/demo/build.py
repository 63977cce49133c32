"""From the drawing and the recording to a complete model package on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.torch import load_file

from lipsync.demo.leftovers import DRAFT_MARK, MANIFEST, sweep_drafts, sweep_versions
from lipsync.demo.presenter import FRAME_HEIGHT, FRAME_WIDTH, Frame, Pose, draw_frame, pose_track
from lipsync.demo.speech import ASSETS, Mouth, Timeline, frame_count, mouth_track, read_wav
from lipsync.engine.audio import VIDEO_FPS, audio_features, encoder_from_state_dict
from lipsync.engine.geometry import BORDER, GEOMETRIES
from lipsync.engine.h264 import H264Track
from lipsync.errors import PackageError, PackageProblem

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done, and how much there is."""
Uint8 = npt.NDArray[np.uint8]

GEOMETRY = GEOMETRIES[320]

FILES = {
    "full_body": "full_body.mp4",
    "crops_328": "crops_328.mp4",
    "model_inputs": "model_inputs.mp4",
    "rois_320": "rois_320.mp4",
    "audio": "aud_ave.npy",
    "rectangles": "crop_rectangles.json",
    "landmarks": "landmarks_2d.npy",
    "network": "checkpoint/network.safetensors",
    "audio_encoder": "audio_encoder.safetensors",
    "speech": "speech.wav",
}
VIDEO_SIZES = {
    "full_body": (FRAME_WIDTH, FRAME_HEIGHT),
    "crops_328": (GEOMETRY.crop_size, GEOMETRY.crop_size),
    "rois_320": (GEOMETRY.face_size, GEOMETRY.face_size),
    "model_inputs": (GEOMETRY.face_size, GEOMETRY.face_size),
}
"""Width and height of each video."""
FRAME_CRF = 15
FACE_CRF = 8
"""x264's rate factor: the lower the rate factor, the finer. What the network sees must be nearly lossless."""
FRAMES_AHEAD = 16
"""Frames drawn before they are encoded: 3 MB each."""
CLOSED_BELOW = 0.03
"""Of every value of a mouth's shape: what is less is not seen."""
MIN_IDLE_FRAMES = 10
"""The recording has no long pause: those between its sentences are 0.4 s."""
N_DRAWERS = min(4, os.cpu_count() or 1)


class BuildStopped(Exception):
    """The caller's `stop` was set before the package was complete. Nothing of it is left on disk."""


def _version() -> str:
    """Changes with anything that the package is made from: weights, recording, drawing."""
    digest = hashlib.sha256()
    parts = [*ASSETS.iterdir(), *ASSETS.parent.glob("*.py")]
    for path in sorted(path for path in parts if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def demo_package_folder() -> Path:
    """Where the demo's package is kept: in the user's cache folder, below the version of what it is made from."""
    import platformdirs  # of the cli extra: whoever names a folder does without it

    return Path(platformdirs.user_cache_dir("lipsync", appauthor=False)) / f"demo-{_version()}" / "demo"


def build_demo_package(
    folder: Path | None = None, progress: Progress | None = None, *, stop: threading.Event | None = None
) -> Path:
    """Make the demo's model package, or find it made.

    It is built beside `folder` and moved there when complete: an interrupted build leaves nothing, a killed one a draft
    that a later build removes. In the user's cache folder packages of other versions go as well, once they are old.

    Args:
        folder: the package's own folder; by default one in the user's cache folder.
        progress: called with (stage, done, total) during the work; not called if there is none.
        stop: set from another thread, it ends the work. Ctrl-C should do that, and not interrupt this function:
            compiled code below it turns a KeyboardInterrupt into errors of its own.
    Returns the package's folder.
    Raises:
        PackageError: `folder` holds something else.
        BuildStopped: `stop` was set.
    """
    target = Path(folder) if folder is not None else demo_package_folder()
    version = _version()
    if _built_version(target) == version:
        if folder is None:
            with contextlib.suppress(OSError):
                os.utime(target.parent)  # when it was last used: `sweep_versions` looks
        return target
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_drafts(target, FILES.values())
    if folder is None:
        sweep_versions(target, FILES.values())
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (draft / DRAFT_MARK).touch()
        stop = stop or threading.Event()
        _build(draft, version, progress or _no_progress, stop)
        if stop.is_set():  # while the last of it was written
            raise BuildStopped
        draft.chmod(0o755)  # mkdtemp made it private
        (draft / DRAFT_MARK).unlink()
        if _built_version(target) == version:  # another process was quicker
            shutil.rmtree(draft)
        else:
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def resized_crop(region: Image.Image) -> Uint8:
    """The face's square at the size of a crop: (328, 328, 3) uint8 RGB."""
    return np.asarray(region.resize((GEOMETRY.crop_size, GEOMETRY.crop_size), Image.Resampling.BICUBIC))


def face_of_crop(crop: Uint8) -> Uint8:
    """The crop less its border: (320, 320, 3), the network's face."""
    return crop[BORDER:-BORDER, BORDER:-BORDER]


def closed_ranges(shapes: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """The stretches in which the drawn mouth is closed, of at least MIN_IDLE_FRAMES: [first, end) frames.

    `shapes`: (frames, 6) float32, as `mouth_track` gives them.
    """
    closed = np.abs(shapes).max(axis=1) < CLOSED_BELOW
    edges = np.flatnonzero(np.diff(np.concatenate(([False], closed, [False])).astype(np.int8)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(first, end) for first, end in pairs if end - first >= MIN_IDLE_FRAMES]


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def _built_version(folder: Path) -> str | None:
    """The version of the demo package in a folder, None if there is no complete one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        complete = all((folder / name).is_file() for name in FILES.values())
        return str(manifest["build"]) if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["name"] == "demo":
            return
    problem = PackageProblem(str(folder), "something else is there", "no such folder, an empty one, or a demo package")
    raise PackageError(str(folder), [problem])


def video_pictures(frame: Frame) -> dict[str, Uint8]:
    """What each video shows of a frame: (height, width, 3) uint8 RGB by role."""
    crop = resized_crop(frame.image.crop(frame.rectangle))
    face = face_of_crop(crop)
    masked = face.copy()
    masked[slice(*GEOMETRY.mask_y), slice(*GEOMETRY.mask_x)] = 0
    return {"full_body": np.asarray(frame.image), "crops_328": crop, "rois_320": face, "model_inputs": masked}


def open_track(stack: contextlib.ExitStack, path: Path, role: str, *, frame_crf: int) -> H264Track:
    """A video of a role, which the stack closes. `frame_crf`: of whole frames; faces are nearly lossless."""
    container = stack.enter_context(av.open(str(path), "w", options={"movflags": "+faststart"}))
    width, height = VIDEO_SIZES[role]
    crf = frame_crf if role == "full_body" else FACE_CRF
    # one thread: the same file on every machine
    return H264Track(container, width=width, height=height, fps=VIDEO_FPS, crf=crf, n_threads=1)


def drawn_frames(poses: list[Pose], shapes: npt.NDArray[np.float32]) -> Iterator[Frame]:
    """Frames in order, drawn by several threads, a few ahead of the one that is taken."""
    mouths = [Mouth.from_array(row) for row in shapes]
    draw_frame(poses[0])  # fills the caches of what never changes, once
    with ThreadPoolExecutor(N_DRAWERS) as drawers:
        for first in range(0, len(poses), FRAMES_AHEAD):
            part = slice(first, first + FRAMES_AHEAD)
            yield from drawers.map(draw_frame, poses[part], mouths[part])


def _write_videos(
    folder: Path, frames: Iterator[Frame], total: int, progress: Progress, stop: threading.Event
) -> list[Frame]:
    """The four videos. Returns the frames without their pictures' pixels."""
    drawn: list[Frame] = []
    with contextlib.ExitStack() as stack:
        tracks = {role: open_track(stack, folder / FILES[role], role, frame_crf=FRAME_CRF) for role in VIDEO_SIZES}
        for frame in frames:
            if stop.is_set():
                raise BuildStopped
            for role, picture in video_pictures(frame).items():
                tracks[role].write(picture)
            drawn.append(Frame(Image.new("RGB", (1, 1)), frame.landmarks, frame.rectangle))
            progress("drawing", len(drawn), total)
        for track in tracks.values():
            track.finish()
    return drawn


def _build(folder: Path, version: str, progress: Progress, stop: threading.Event) -> None:
    samples = read_wav(ASSETS / "speech.wav")
    n_frames = frame_count(len(samples))

    progress("listening", 0, 1)
    encoder = encoder_from_state_dict(load_file(ASSETS / "audio_encoder.safetensors"))
    features = audio_features(encoder, samples)[:n_frames]
    np.save(folder / FILES["audio"], features.astype(np.float32))
    progress("listening", 1, 1)
    if stop.is_set():
        raise BuildStopped

    shapes = mouth_track(Timeline.load(ASSETS / "speech.json"), n_frames)
    drawn = _write_videos(folder, drawn_frames(pose_track(n_frames), shapes), n_frames, progress, stop)
    np.save(folder / FILES["landmarks"], np.stack([frame.landmarks for frame in drawn]))
    rectangles = {str(i): {"rect": list(frame.rectangle)} for i, frame in enumerate(drawn)}
    (folder / FILES["rectangles"]).write_text(json.dumps(rectangles) + "\n", encoding="utf-8")

    (folder / FILES["network"]).parent.mkdir()
    for role in ("network", "audio_encoder", "speech"):
        shutil.copyfile(ASSETS / Path(FILES[role]).name, folder / FILES[role])
    manifest = {
        "format": "lipsync-package",
        "version": 1,
        "name": "demo",
        "build": version,
        "files": FILES,
        "idle": closed_ranges(shapes),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
