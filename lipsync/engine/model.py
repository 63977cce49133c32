"""One loaded model: its frames in memory, its network on a device, and a frame's way through it."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lipsync.engine.audio import feature_window
from lipsync.engine.backgrounds import Backgrounds, BackgroundTrack
from lipsync.engine.blending import HARD
from lipsync.engine.compositor import FACE_ALONE, UInt8, composite_crop, enlarged, face_alone, mix
from lipsync.engine.jpeg import encode_jpeg, mix_jpegs
from lipsync.engine.memory import return_free_memory
from lipsync.engine.observer import EngineObserver, Unobserved
from lipsync.engine.package import ModelPackage
from lipsync.engine.prepared import PreparedCache
from lipsync.engine.prepared_backgrounds import PreparedBackgrounds
from lipsync.engine.prepared_videos import decode_prepared
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.runtime import ChosenRuntime, FaceSet, choose_runtime, device_errors
from lipsync.engine.statistics import FrameStatistics
from lipsync.types import Bounds, Frame, LoadedPart, Output, StepTimes

USED_VIDEOS = ("full_body", "crops_328")
"""The videos that frames are made from. The others can be derived from these, and are checked but not decoded."""

Progress = Callable[[str, int, int], None]
"""Called with a role, frames decoded, frames in all; from the decoding threads."""


@dataclass(frozen=True)
class FrameRequest:
    """A valid request for one frame.

    Attributes:
        arrived_s: time.perf_counter() of its arrival.
        backgrounds: of its quality, with this frame's among them; None where the face alone is wanted.
        window: what the network hears, (rows, width) float32; None takes the package's own.
        rest: how much of the resting picture it shows: 0 speaks, 1 rests, which takes no network.
        rest_frame_id: whose own picture the resting one is; None for that of the same frame.
    """

    frame_id: int
    output: Output
    jpeg_quality: int
    arrived_s: float
    backgrounds: BackgroundTrack | None = None
    window: npt.NDArray[np.float32] | None = None
    rest: float = 0.0
    rest_frame_id: int | None = None

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """The video's frames that its picture is made of."""
        return (self.frame_id,) if self.rest_frame_id is None else (self.frame_id, self.rest_frame_id)


@dataclass(frozen=True)
class MovedFace:
    """The face for one request, as its runtime gives it, and how long it took to get there.

    `resting` is the own face of the request's other frame, where there is one.
    """

    face: npt.NDArray[np.uint8]
    resting: npt.NDArray[np.uint8] | None
    queue_ms: float
    prepare_ms: float
    inference_ms: float


def describe_parts(package: ModelPackage) -> dict[str, str]:
    """What each role of a package holds, for people."""
    found = {
        role: f"{info.width}x{info.height}, {info.frame_count} frames at {float(info.fps):g} fps, {info.codec}"
        for role, info in package.videos.items()
    }
    found["audio"] = f"{package.front_end.name} features, {' x '.join(map(str, package.features.shape))}"
    widths = package.rectangles[:, 2] - package.rectangles[:, 0]
    found["rectangles"] = f"{len(package.rectangles)}, {widths.min()} to {widths.max()} pixels wide"
    if package.landmarks is not None:
        found["landmarks"] = " x ".join(map(str, package.landmarks.shape))
    n_parameters = sum(p.numel() for p in package.network.parameters())
    window = " x ".join(map(str, package.window_shape))
    face_size = package.network.config.face_size
    found["network"] = f"{face_size} px, {n_parameters / 1e6:.2f} M parameters, audio window {window}"
    for role, path in (("audio_encoder", package.audio_encoder), ("speech", package.speech)):
        if path is not None:
            found[role] = path.name
    return found


@dataclass(frozen=True)
class ModelOptions:
    """What of the engine's settings concerns a model.

    Attributes:
        device: where its network runs.
        runtime: how: "auto", a kind or a full name; see `runtime.choose_runtime`.
        jpeg_quality: whose backgrounds are prepared at load.
        batch_sizes: that the runtime should be ready for.
        memory_budget_bytes: up to which features of the encoder may be kept; 0 keeps none.
        blend: how a face meets the crop around it: hard, feather or matched.
        observer: is told of its batches.
        prepared: what is decoded and prepared may be there already, and goes there.
    """

    device: torch.device
    runtime: str = "auto"
    jpeg_quality: int = 90
    batch_sizes: tuple[int, ...] = (1,)
    memory_budget_bytes: int = 0
    blend: str = HARD
    observer: EngineObserver = Unobserved()
    prepared: PreparedCache | None = None


class Model:
    """A package in memory. `run` and `finish` are the two halves of a frame's way, for the scheduler's threads."""

    def __init__(
        self,
        name: str,
        package: ModelPackage,
        faces: FaceSet,
        chosen: ChosenRuntime,
        jpeg_quality: int,
        times_ms: dict[str, float],
        *,
        crops_mapped: bool = False,
        prepared: PreparedCache | None = None,
    ) -> None:
        """Begins to prepare the whole frames: until then the network had all cores for itself."""
        self.name = name
        self.package = package
        self.frame_count = package.frame_count
        self.runtime = chosen.runtime
        self.load_ms = 0.0
        self.version = uuid.uuid4().hex[:12]
        self.closed_with_it = contextlib.ExitStack()
        self.statistics = FrameStatistics()
        self.observer: EngineObserver = Unobserved()
        self._times_ms = times_ms
        self._details = describe_parts(package)
        self._details["full_body"] += "; prepared while serving"
        self._details["network"] += f"; {chosen.runtime.name}"
        if chosen.psnr_db != float("inf"):
            self._details["network"] += f", {chosen.psnr_db:.1f} dB from float32"
        self._windows = faces.windows
        self._blend = faces.blend
        # A runtime that resizes has crops of its own, on its device.
        self._crops: npt.NDArray[np.uint8] | None = None if chosen.runtime.resizes else faces.crops.numpy()
        self._rectangles = _as_tuples(package.rectangles)
        self._crops_mapped = crops_mapped
        body = package.videos["full_body"]
        shared = None if prepared is None else PreparedBackgrounds(prepared, body, self._rectangles)
        self._backgrounds = Backgrounds(body, self._rectangles, jpeg_quality, shared)

    @classmethod
    def load(
        cls,
        name: str,
        package: ModelPackage,
        options: ModelOptions,
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> Model:
        """Decode the face crops and set up the network; whole frames are prepared behind that. Blocking; `stop` ends it
        early.

        Raises MediaError, DeviceError, or lipsync.engine.video.DecodingStopped. A whole frame that cannot be decoded
        is told to whoever asks for it.
        """
        start = time.perf_counter()
        decoded_crops = decode_prepared(
            "crops_328",
            package.videos["crops_328"],
            options.prepared,
            pin_memory=options.device.type == "cuda",
            progress=progress,
            stop=stop,
        )
        crops = decoded_crops.frames
        decoded = time.perf_counter()

        def windows(frame_ids: Sequence[int]) -> torch.Tensor:
            return _windows(package, frame_ids)

        faces = FaceSet(crops, package.rectangles, package.geometry, package.window_shape, windows, options.blend)
        with device_errors(options.device, "while the network was loaded"):
            chosen = choose_runtime(
                options.runtime,
                package.network,
                faces,
                options.device,
                feature_budget_bytes=max(0, options.memory_budget_bytes - crops.nbytes),
                batch_sizes=options.batch_sizes,
            )
        times_ms = {
            "full_body": package.open_ms["full_body"],
            "crops_328": package.open_ms["crops_328"] + (decoded - start) * 1000,
            "audio": package.open_ms["audio"],
            "network": package.open_ms["network"] + (time.perf_counter() - decoded) * 1000,
        }
        # The runtime has weights of its own: these would be kept twice. Their shapes stay.
        package.network.to("meta")
        return_free_memory()
        model = cls(
            *(name, package, faces, chosen, options.jpeg_quality, times_ms),
            crops_mapped=decoded_crops.mapped,
            prepared=options.prepared,
        )
        model.observer = options.observer
        return model

    def stop_preparing(self) -> None:
        """Prepare no more backgrounds: whoever waits for one gets EngineClosedError."""
        self._backgrounds.stop()

    def close(self) -> None:
        """Give the memory back. Nobody may use the model any more, or hold its arrays."""
        self._backgrounds.close()
        self.closed_with_it.close()
        self.package.close()
        del self._crops, self._windows, self.runtime, self.package
        return_free_memory()

    @property
    def largest_useful_batch(self) -> int:
        return self.runtime.largest_useful_batch

    @property
    def parts(self) -> tuple[LoadedPart, ...]:
        """What it was made from, and the memory that each keeps now; whole frames add to it until all are prepared, and
        with a prepared cache are mapped then."""
        crops = 0 if self._crops is None else self._crops.nbytes
        features = self.package.features.nbytes
        features_mapped = self.package.features_memory_mapped
        memory = {  # of this process, and mapped
            "full_body": (self._backgrounds.nbytes, self._backgrounds.mapped_bytes),
            "crops_328": (0, crops) if self._crops_mapped else (crops, 0),
            "audio": (0, features) if features_mapped else (features, 0),
            "network": (self.runtime.nbytes, 0),
        }
        return tuple(
            LoadedPart(role, self._details[role], self.package.sizes[role], own, self._times_ms[role], mapped)
            for role, (own, mapped) in memory.items()
        )

    @property
    def memory_bytes(self) -> int:
        """What it keeps in memory now."""
        return sum(part.memory_bytes for part in self.parts)

    @property
    def expected_bytes(self) -> int:
        """What it will keep in memory, about, once its whole frames are prepared and its audio encoder is read."""
        parts = sum(part.memory_bytes for part in self.parts if part.role != "full_body")
        return parts + self._backgrounds.expected_nbytes + self.package.sizes.get("audio_encoder", 0)

    def backgrounds(self, jpeg_quality: int) -> BackgroundTrack:
        """Whole frames of a quality less their faces; they begin to be prepared if nobody asked for them before.

        Raises OverloadedError if too many other qualities are being prepared.
        """
        return self._backgrounds.track(jpeg_quality)

    def run(self, items: list[FrameRequest]) -> list[MovedFace]:
        """Prepare a batch and put it through the network: one face a request, in order."""
        started = time.perf_counter()
        spoken = [item for item in items if item.rest < 1]
        windows = [self._window(item) for item in spoken]
        prepared = time.perf_counter()
        with device_errors(torch.device(self.runtime.device), f"with a batch of {len(items)} frames"):
            alone = {i for i, item in enumerate(spoken) if item.output is Output.FACE_320}
            frame_ids = [item.frame_id for item in spoken]
            moved = self.runtime.run(frame_ids, torch.stack(windows), alone=alone) if spoken else []
            faces = iter(moved)
            pairs = [self._with_rest(item, next(faces) if item.rest < 1 else None) for item in items]
        inferred = time.perf_counter()
        self.observer.batch_finished(self.name, len(items), inferred - prepared)
        return [
            MovedFace(
                face,
                resting,
                queue_ms=(started - item.arrived_s) * 1000,
                prepare_ms=(prepared - started) * 1000,
                inference_ms=(inferred - prepared) * 1000,
            )
            for item, (face, resting) in zip(items, pairs, strict=True)
        ]

    def _window(self, item: FrameRequest) -> torch.Tensor:
        """What the network hears for a request: window_shape float32."""
        if item.window is None:
            return self._windows([item.frame_id])[0]
        return torch.from_numpy(item.window).reshape(self.package.window_shape)

    def _with_rest(self, item: FrameRequest, moved: UInt8 | None) -> tuple[UInt8, UInt8 | None]:
        """The face that a request shows, and the own face of its other frame, if it has one."""
        alone = item.output is Output.FACE_320
        if item.rest_frame_id is not None and moved is not None:
            return moved, self.runtime.own(item.rest_frame_id, alone=alone)
        if moved is not None and not item.rest:
            return moved, None
        own = self.runtime.own(item.frame_id, alone=alone)
        return (own if moved is None else mix(moved, own, item.rest)), None

    def finish(self, item: FrameRequest, made: MovedFace) -> Frame:
        """Composite and encode one frame. Raises what kept its background from being prepared."""
        started = time.perf_counter()
        encode = self._composite(item, item.frame_id, made.face)
        composited = time.perf_counter()
        jpeg = encode()
        if made.resting is not None and item.rest_frame_id is not None:
            resting = self._composite(item, item.rest_frame_id, made.resting)()
            jpeg = mix_jpegs(jpeg, resting, item.rest, item.jpeg_quality)
        encoded = time.perf_counter()
        times = StepTimes(
            queue_ms=made.queue_ms,
            prepare_ms=made.prepare_ms,
            inference_ms=made.inference_ms,
            composite_ms=(composited - started) * 1000,
            encode_ms=(encoded - composited) * 1000,
            total_ms=(encoded - item.arrived_s) * 1000,
        )
        self.statistics.record(total_ms=times.total_ms, inference_ms=times.inference_ms)
        return Frame(
            model_name=self.name,
            frame_id=item.frame_id,
            jpeg=jpeg,
            shape=self._shape(item),
            bounds=self.bounds(item.frame_id),
            times=times,
        )

    def _shape(self, item: FrameRequest) -> tuple[int, int, int]:
        """(height, width, channels) of a request's picture."""
        if item.output is Output.FACE_320:
            return FACE_ALONE, FACE_ALONE, 3
        if item.backgrounds is not None:
            return self.package.height, self.package.width, 3
        bounds = self.bounds(item.frame_id)
        return bounds.height, bounds.width, 3

    def bounds(self, frame_id: int) -> Bounds:
        """The face in the whole frame."""
        x1, y1, x2, y2 = self._rectangles[frame_id]
        return Bounds(x1, y1, x2 - x1, y2 - y1)

    def _composite(self, item: FrameRequest, frame_id: int, face: UInt8) -> Callable[[], bytes]:
        """Put a face into a frame. Returns what encodes it."""
        x1, y1, x2, y2 = self._rectangles[frame_id]
        if item.output is Output.FACE_320:
            if self._crops is None:
                picture = enlarged(face)
            else:
                picture = face_alone(self._crops[frame_id], face, blend=self._blend)
        elif self._crops is None:
            picture = Image.fromarray(face)
        else:
            picture = composite_crop(self._crops[frame_id], face, x2 - x1, y2 - y1, blend=self._blend)
        if item.backgrounds is None:
            return partial(encode_jpeg, picture, item.jpeg_quality)
        background = item.backgrounds.get(frame_id)
        return partial(background.jpeg.splice, background.ring.compose(picture))


def _as_tuples(rectangles: npt.NDArray[np.int32]) -> list[Rectangle]:
    return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in rectangles]


def _windows(package: ModelPackage, frame_ids: Sequence[int]) -> torch.Tensor:
    """The package's own feature windows: (n, *window_shape) float32."""
    rows, shape = package.window_rows, package.window_shape
    windows = [feature_window(package.features, frame_id, rows).reshape(shape) for frame_id in frame_ids]
    return torch.from_numpy(np.stack(windows))
