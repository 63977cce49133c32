"""NVIDIA GPUs: everything from a frame's number to its resized crop happens on the device, as one CUDA graph a batch.

A batch is three copies and one launch: feature windows and frame numbers go to the device, the graph of its size runs,
resized crops come back, or faces alone where those are wanted. Faces live on the device already, and nothing in between
waits for the host.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipsync.engine.blending import HARD, BatchBlender
from lipsync.engine.geometry import BORDER
from lipsync.engine.memory import CAPTURING
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.resample import Resizer
from lipsync.engine.runtime import FaceSet, Int32, UInt8

logger = logging.getLogger(__name__)

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}
N_WARM_UPS = 3
"""Runs before a capture, as many as torch's documentation takes: libraries set themselves up, kernels are loaded."""

cuda: Any = torch.cuda
"""Without the types that torch's streams and events lack."""


class CropComposer:
    """The crops of all frames on a device, and moved faces into them: what `composite_crop` does, for whole batches.

    Args:
        crops: (n_frames, size, size, 3) uint8 RGB.
        rectangles: (n_frames, 4) int32: x1, y1, x2, y2 of each crop in its whole frame, ends exclusive.
        device: where the crops are kept, and the faces will be.
        blend: as in `EngineConfig`.
    """

    def __init__(self, crops: Tensor, rectangles: Int32, device: torch.device, *, blend: str = HARD) -> None:
        widths, heights = rectangles[:, 2] - rectangles[:, 0], rectangles[:, 3] - rectangles[:, 1]
        self._crop_shape = crops.shape[1:]
        # As 64-bit words: a batch of crops is gathered element by element, and bytes would be eight times as many.
        self._crops = crops.to(device).flatten(1).view(torch.int64)
        self._resizer = Resizer(crops.shape[1], widths.tolist(), heights.tolist(), device)
        self._blender = BatchBlender(crops.shape[1] - 2 * BORDER, blend, device)
        self.sizes: list[tuple[int, int]] = list(zip(heights.tolist(), widths.tolist(), strict=True))
        """(height, width) of each frame's crop rectangle, in pixels."""

    @property
    def max_height(self) -> int:
        return self._resizer.max_height

    @property
    def max_width(self) -> int:
        return self._resizer.max_width

    @property
    def nbytes(self) -> int:
        """Bytes of the crops, and of the tables of blending and resizing."""
        return self._crops.nbytes + self._blender.nbytes + self._resizer.nbytes

    def crops(self, frame_ids: Tensor) -> Tensor:
        """(n, size, size, 3) uint8 RGB, new. frame_ids: (n,) int64, on the device."""
        return self._crops.index_select(0, frame_ids).view(torch.uint8).view(-1, *self._crop_shape)

    def compose(self, crops: Tensor, faces: Tensor, frame_ids: Tensor) -> Tensor:
        """Faces inside the border of their crops, resized to the crop rectangles.

        Args:
            crops: as `crops` gave them; the faces are written into them.
            faces: (n, size - 8, size - 8, 3), RGB in 0..255 of any type, truncated to uint8.
            frame_ids: (n,) int64, on the device.
        Returns (n, max_height, max_width, 3) uint8 RGB: each at the top left, zero beside and below it.
        """
        self._blender(crops, faces)
        return self._resizer(crops, frame_ids)


class CudaRuntime:
    """Batches go through together, each as the graph of the next larger batch size; what fills it up is dropped.

    On a device that is not CUDA the same steps run without graphs, for tests.

    Args:
        precision: "float16" or "float32". With the latter cuDNN may use TF32, if torch allows it, as it does by
            default; `optimizations` says so.
        batch_sizes: that graphs are made for. Larger batches run in pieces of the largest.
    Raises torch.OutOfMemoryError if the device has no memory for it.
    """

    largest_useful_batch = sys.maxsize
    resizes = True

    def __init__(
        self,
        plan: InferencePlan[Tensor],
        faces: FaceSet,
        device: torch.device,
        precision: str,
        *,
        batch_sizes: Sequence[int] = (1,),
    ) -> None:
        self._plan = plan
        self._device = device
        self._precision = precision
        self._ops = TorchOps(device, PRECISIONS[precision])
        self._batch_sizes = sorted(set(batch_sizes))
        self._window_size = faces.window_shape[1:]
        if precision == "float32":
            self._low_precision = "tf32" if _uses_tf32(device) else ""
        else:
            self._low_precision = precision
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graph_bytes = 0
        is_cuda = device.type == "cuda"
        # Its own, so that models do not wait for each other. Memory used on one stream only needs no further care.
        self._stream = cuda.Stream(device) if is_cuda else None
        # Waiting for it sleeps: the cores have JPEGs to encode.
        self._done = cuda.Event(blocking=True) if is_cuda else None

        with self._on_device():
            self._composer = CropComposer(faces.crops, faces.rectangles, device, blend=faces.blend)
            n = self._batch_sizes[-1]
            shape = (n, self._composer.max_height, self._composer.max_width, 3)
            # Graphs read and write fixed addresses; pinned host memory is copied without the host's waiting.
            self._ids = torch.zeros(n, dtype=torch.int64, device=device)
            self._windows = torch.zeros(n, *faces.window_shape, device=device)
            self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
            face_size = faces.geometry.face_size
            self._faces = torch.zeros(n, face_size, face_size, 3, dtype=torch.uint8, device=device)
            self._host_ids = torch.zeros(n, dtype=torch.int64, pin_memory=is_cuda)
            self._host_windows = torch.zeros(n, *faces.window_shape, pin_memory=is_cuda)
            self._host_pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=is_cuda)
            self._host_faces = torch.zeros(self._faces.shape, dtype=torch.uint8, pin_memory=is_cuda)
            if is_cuda:
                self._make_graphs()

    @property
    def name(self) -> str:
        return f"cuda-{self._precision}"

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def optimizations(self) -> tuple[str, ...]:
        graphs = ("cuda_graphs",) if self._graphs else ()
        low = (self._low_precision,) if self._low_precision else ()
        network = ("folded_batch_norms", "composed_convolutions", "channels_last")
        return (*graphs, *low, *network, "resident_faces", "device_composition")

    @property
    def nbytes(self) -> int:
        """Bytes on the device: weights, crops, buffers, and what the graphs work in."""
        buffers = sum(each.nbytes for each in (self._ids, self._windows, self._pixels, self._faces))
        return self._ops.nbytes + self._composer.nbytes + buffers + self._graph_bytes

    def run(self, frame_ids: Sequence[int], windows: Tensor, *, alone: Collection[int] = ()) -> list[UInt8]:
        made: list[UInt8] = []
        largest = self._batch_sizes[-1]
        with self._on_device():
            for start in range(0, len(frame_ids), largest):
                piece = slice(start, start + largest)
                alone_here = {place - start for place in alone}
                made += self._run_batch(frame_ids[piece], windows[piece], alone_here)
        return made

    def own(self, frame_id: int, *, alone: bool = False) -> UInt8:
        height, width = self._composer.sizes[frame_id]
        with self._on_device():
            ids = torch.tensor([frame_id], device=self._device)
            crops = self._composer.crops(ids)
            face = crops[:, BORDER:-BORDER, BORDER:-BORDER].clone()
            if alone:  # blending a face with itself changes nothing
                return np.asarray(face[0].cpu().numpy())
            return np.asarray(self._composer.compose(crops, face, ids)[0, :height, :width].cpu().numpy())

    def _run_batch(self, frame_ids: Sequence[int], windows: Tensor, alone: Collection[int]) -> list[UInt8]:
        """`run` for as many frames as fit into the buffers."""
        n = len(frame_ids)
        sizes = self._composer.sizes
        for frame_id in frame_ids:
            # On the device this would be an error that only a new process recovers from.
            if not 0 <= frame_id < len(sizes):
                raise IndexError(f"frame {frame_id} of {len(sizes)}")
        self._host_ids[:n].copy_(torch.tensor(frame_ids))
        self._host_windows[:n].copy_(windows)
        self._ids[:n].copy_(self._host_ids[:n], non_blocking=True)
        self._windows[:n].copy_(self._host_windows[:n], non_blocking=True)
        # The rest of a graph's batch is whatever was there before.
        graph = self._graphs.get(next(size for size in self._batch_sizes if size >= n))
        if graph is None:
            self._step(n)
        else:
            graph.replay()
        n_alone = sum(i in alone for i in range(n))
        if n_alone < n:
            self._host_pixels[:n].copy_(self._pixels[:n], non_blocking=True)
        if n_alone:
            self._host_faces[:n].copy_(self._faces[:n], non_blocking=True)
        self._wait()
        pixels, faces = self._host_pixels.numpy(), self._host_faces.numpy()
        made = []
        for i, frame_id in enumerate(frame_ids):
            height, width = sizes[frame_id]
            made.append((faces[i] if i in alone else pixels[i, :height, :width]).copy())
        return made

    def _step(self, n: int) -> None:
        """From the first n frame numbers and windows in the buffers to as many resized crops, and faces, there."""
        frame_ids = self._ids[:n]
        crops = self._composer.crops(frame_ids)
        face = self._ops.place(crops[:, BORDER:-BORDER, BORDER:-BORDER]).permute(0, 3, 1, 2)
        levels = self._plan.encode(self._ops, face, self._plan.n_levels)
        moved = self._plan.decode(self._ops, levels, self._ops.place(self._windows[:n]), self._window_size)
        self._pixels[:n] = self._composer.compose(crops, moved.permute(0, 2, 3, 1), frame_ids)
        self._faces[:n] = crops[:, BORDER:-BORDER, BORDER:-BORDER]

    def _wait(self) -> None:
        """Until the device has done all that it was given. Releases the GIL."""
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """What happens inside happens on this runtime's stream, and nothing is kept for gradients."""
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.inference_mode(), stream:
            yield

    def _make_graphs(self) -> None:
        """Capture a graph for every batch size, as far as that works. The sizes that it fails for run without."""
        # All graphs work in the same memory, for one runs at a time and nothing of it outlives its run. The largest is
        # captured first: the others fit into what it took.
        largest_first = self._batch_sizes[::-1]
        for n in largest_first:
            for _ in range(N_WARM_UPS):
                self._step(n)
        pools = [torch.cuda.graph_pool_handle()]
        for n in largest_first:
            graph = torch.cuda.CUDAGraph()
            try:
                with (
                    CAPTURING,
                    # Other models may allocate and wait, each in its own thread, while this one is captured.
                    torch.cuda.graph(graph, pool=pools[-1], stream=self._stream, capture_error_mode="thread_local"),
                ):
                    self._step(n)
                # The first launch of a graph uploads it to the device.
                graph.replay()
                self._wait()
            except RuntimeError as error:
                logger.warning("no CUDA graph for batches of %d on %s, they run without: %s", n, self._device, error)
                # A pool is of no use to torch any more once a capture into it has failed.
                pools.append(torch.cuda.graph_pool_handle())
            else:
                self._graphs[n] = graph
        segments = cuda.memory_snapshot()
        self._graph_bytes = sum(each["total_size"] for each in segments if each["segment_pool_id"] in pools)


def _uses_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions on a device keep 10 bits of their inputs' mantissas, as torch is set at present."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")
