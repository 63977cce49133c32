"""The packages that are measured: one person of 523 frames, and shorter cuts of the same, built once and kept.

The pictures are the demo's drawn presenter; the network has the full width and weights drawn from a seed, so that it
costs what a trained one costs. What it paints is no face, but has contrast and detail: flat pictures would make JPEGs
small, and rounding errors invisible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import nn

import lipsync.demo
from lipsync.demo.build import VIDEO_SIZES, drawn_frames, open_track, video_pictures
from lipsync.demo.presenter import Frame, pose_track
from lipsync.demo.speech import ASSETS, Timeline, frame_count, mouth_track, read_wav
from lipsync.engine.audio import FEATURE_WIDTH, AudioEncoder, feature_window
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.unet import OutConv, UNet, UNetConfig
from lipsync.errors import LipsyncError

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, steps done, steps in all."""
UInt8 = npt.NDArray[np.uint8]

N_FRAMES = 523
SEED = 320
FULL, HALF, QUARTER, START = "full", "half", "quarter", "start"
DIVISORS = {FULL: 1, HALF: 2, QUARTER: 4}
"""The packages by name, each with what the number of frames is divided by."""
START_FRAMES = 2
START_WIDTH_FACTOR = 0.125
"""One more package, with hardly anything in it: for a server that is started to be told to load another."""
MANIFEST = "bench.json"
"""Beside the packages: says that all of them are complete, and what they were made from."""
FRAME_CRF = 18
"""x264's rate factor: frames as an encoder writes them."""
N_SEEN = 4
"""Frames from which the network's batch norms take their statistics."""
GEOMETRY = GEOMETRIES[320]
BELOW_GAIN = 0.1
"""How much a level of the network hears of those below it, beside the encoder's features of its own size."""
RESIDUAL_GAIN = 0.2
"""How much a residual block adds to what it was given."""
OUTPUT_SPREAD = 0.35
"""Standard deviation of the network's output before its sigmoid."""


class BuildStopped(LipsyncError):
    """The caller's `stop` was set before the packages were complete. Nothing of them is left on disk."""


@dataclass(frozen=True)
class BenchPackages:
    """The built packages: a folder of models as `lipsync serve --models` takes it.

    Attributes:
        folder: holds one folder a package.
        frame_counts: frames of each, by name.
        width_factor: of the network's channels: 1 is the full width.
    """

    folder: Path
    frame_counts: dict[str, int]
    width_factor: float

    def path(self, name: str) -> Path:
        """The folder of one package."""
        return self.folder / name

    @classmethod
    def open(cls, folder: Path) -> BenchPackages:
        """Find built packages. Raises LipsyncError if they are not there, or not complete."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            frame_counts = {str(name): int(n) for name, n in manifest["frames"].items()}
            packages = cls(folder, frame_counts, float(manifest["width_factor"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LipsyncError(
                f"no packages to measure in {folder}; build them: lipsync bench --make-package"
            ) from error
        missing = [name for name in (*DIVISORS, START) if not packages.path(name).is_dir() or name not in frame_counts]
        if missing:
            raise LipsyncError(f"{folder} lacks {', '.join(missing)}; remove it, and build it again")
        return packages


def default_folder() -> Path:
    """Where the packages are kept: in the user's cache folder, below the version of what they are made from."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("lipsync", appauthor=False)) / f"bench-{_version()}"


def make_packages(
    folder: Path,
    progress: OnProgress | None = None,
    *,
    n_frames: int = N_FRAMES,
    width_factor: float = 1.0,
    stop: threading.Event | None = None,
) -> BenchPackages:
    """Build the packages, or find them built. They appear at `folder` when they are complete.

    Args:
        folder: of all of them; must not hold anything else.
        progress: called during the work.
        n_frames: of the longest.
        width_factor: of the network's channels: tests take a narrow one.
        stop: set from another thread, it ends the work.
    Raises:
        LipsyncError: `folder` holds something else.
        BuildStopped: `stop` was set.
    """
    with contextlib.suppress(LipsyncError):
        built = BenchPackages.open(folder)
        if built.frame_counts[FULL] == n_frames and built.width_factor == width_factor:
            return built
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LipsyncError(f"{folder} holds something else already; name a folder that is empty, or not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _build(draft, n_frames, width_factor, progress or _no_progress, stop or threading.Event())
        draft.chmod(0o755)  # mkdtemp made it private
        with contextlib.suppress(OSError):
            folder.rmdir()
        try:
            draft.rename(folder)
        except OSError:
            BenchPackages.open(folder)  # another process was quicker
            shutil.rmtree(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return BenchPackages.open(folder)


def seeded_network(config: UNetConfig, seed: int, faces: UInt8, windows: npt.NDArray[np.float32]) -> UNet:
    """A network whose weights are drawn from a seed, and fitted to some faces where training would fit them.

    Weights at random alone make a chaotic network, where one rounding error grows to a different picture, or a numb
    one, whose flat picture shows none. So batch norms take their statistics from the faces, each level hears more of
    the encoder's level beside it than of those below, and the last convolution gives its picture contrast. The gains
    below were chosen so that rounding shows in it about as much as in the demo's trained network: so how close a
    runtime comes to float32 here is no evidence of its own; what it does to the demo's network is.

    Args:
        faces: (n, size, size, 3) uint8 RGB.
        windows: (n, *window) float32.
    """
    network = UNet(config)
    below = dict(enumerate((config.fuse[1], *config.up), 1))
    state: dict[str, torch.Tensor] = {}
    for key, tensor in network.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(f"{seed}/{key}".encode()))
        drawn = rng.standard_normal(tuple(tensor.shape))
        if tensor.ndim == 4:
            if tensor.shape[1] == 1:  # depthwise: all positive, these smooth
                drawn = np.abs(drawn)
            drawn /= np.sqrt(np.prod(tensor.shape[1:]))
            if up := re.fullmatch(r"up(\d)\.conv\.double_conv\.0\.conv\.0\.weight", key):
                drawn[:, : below[int(up[1])]] *= BELOW_GAIN
        elif key.endswith("bias"):
            drawn *= 0.1
        elif key.endswith("weight"):  # a batch norm's scale
            drawn = 1 + 0.1 * drawn
            if key.endswith("double_conv.1.conv.7.weight"):
                drawn *= RESIDUAL_GAIN
        else:  # a batch norm's statistics, measured below
            continue
        state[key] = torch.from_numpy(drawn.astype(np.float32))
    network.load_state_dict(state, strict=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages
    pixels = torch.from_numpy(np.ascontiguousarray(faces[..., ::-1])).permute(0, 3, 1, 2) / 255
    masked = pixels.clone()
    masked[:, :, slice(*GEOMETRY.mask_y), slice(*GEOMETRY.mask_x)] = 0
    fitting = network.outc.register_forward_pre_hook(_fit_contrast)
    with torch.inference_mode():
        network.train()(torch.cat((pixels, masked), dim=1), torch.from_numpy(windows))
    fitting.remove()
    return network.eval()


def _fit_contrast(last: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """Have the last convolution give every channel a mean of zero and a spread of OUTPUT_SPREAD, before the sigmoid."""
    assert isinstance(last, OutConv) and last.conv.bias is not None
    found = last.conv(inputs[0])
    scale = OUTPUT_SPREAD / found.std((0, 2, 3))
    last.conv.bias.copy_((last.conv.bias - found.mean((0, 2, 3))) * scale)
    last.conv.weight.mul_(scale[:, None, None, None])


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def _version() -> str:
    """Changes with anything that the packages are made from."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(Path(lipsync.demo.__path__[0]).glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class _Videos:
    """The four videos of one package, being written."""

    def __init__(self, folder: Path, n_frames: int, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.n_frames = n_frames
        self.rectangles: list[tuple[int, int, int, int]] = []
        self.landmarks: list[npt.NDArray[np.float32]] = []
        self._tracks = {
            role: open_track(stack, folder / f"{role}.mp4", role, frame_crf=FRAME_CRF) for role in VIDEO_SIZES
        }

    def write(self, frame: Frame, pictures: dict[str, UInt8]) -> None:
        """Add a frame, unless the package has all of its own already."""
        if len(self.rectangles) == self.n_frames:
            return
        for role, picture in pictures.items():
            self._tracks[role].write(picture)
        self.rectangles.append(frame.rectangle)
        self.landmarks.append(frame.landmarks)

    def finish(self) -> None:
        for track in self._tracks.values():
            track.finish()
        by_frame = {str(i): {"rect": list(rectangle)} for i, rectangle in enumerate(self.rectangles)}
        (self.folder / "crop_rectangles.json").write_text(json.dumps(by_frame) + "\n", encoding="utf-8")
        np.save(self.folder / "landmarks_2d.npy", np.stack(self.landmarks))


def _drawn_frames(n_frames: int) -> Iterator[Frame]:
    """Frames in order; the speech goes to and fro."""
    timeline = Timeline.load(ASSETS / "speech.json")
    shapes = mouth_track(timeline, frame_count(len(read_wav(ASSETS / "speech.wav"))))
    there_and_back = np.concatenate((shapes, shapes[-2:0:-1]))
    return drawn_frames(pose_track(n_frames), there_and_back[np.arange(n_frames) % len(there_and_back)])


def _build(folder: Path, n_frames: int, width_factor: float, progress: OnProgress, stop: threading.Event) -> None:
    frame_counts = {name: max(1, n_frames // divisor) for name, divisor in DIVISORS.items()}
    frame_counts[START] = min(START_FRAMES, n_frames)
    with contextlib.ExitStack() as stack:
        videos = []
        for name, count in frame_counts.items():
            (folder / name / "checkpoint").mkdir(parents=True)
            videos.append(_Videos(folder / name, count, stack))
        faces: list[UInt8] = []
        for done, frame in enumerate(_drawn_frames(n_frames), 1):
            if stop.is_set():
                raise BuildStopped("interrupted while the packages were built")
            pictures = video_pictures(frame)
            for each in videos:
                each.write(frame, pictures)
            if len(faces) < N_SEEN:
                faces.append(pictures["rois_320"])
            progress("drawing", done, n_frames)
        for each in videos:
            each.finish()
    rng = np.random.default_rng(SEED)
    features = np.maximum(rng.standard_normal((n_frames, FEATURE_WIDTH)), 0)  # as the encoder's last ReLU leaves them
    features = features.astype(np.float32)
    states: dict[float, dict[str, torch.Tensor]] = {}
    for factor in (width_factor, START_WIDTH_FACTOR):
        progress("network", len(states), 2)
        config = UNetConfig().scaled(factor)
        windows = [feature_window(features, i).reshape(config.audio_shapes["ave"]) for i in range(len(faces))]
        states[factor] = seeded_network(config, SEED, np.stack(faces), np.stack(windows)).state_dict()
    progress("network", 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        encoder = AudioEncoder().state_dict()
    for name, count in frame_counts.items():
        save_file(encoder, folder / name / "audio_encoder.safetensors")
        state = states[START_WIDTH_FACTOR if name == START else width_factor]
        save_file(state, folder / name / "checkpoint" / "network.safetensors")
        np.save(folder / name / "aud_ave.npy", features[: max(1, count - 1)])  # N - 1 rows is usual
    manifest = {"frames": frame_counts, "width_factor": width_factor, "seed": SEED}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
