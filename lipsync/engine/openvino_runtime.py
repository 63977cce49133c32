"""OpenVINO: the fastest way on CPUs. The graph is built here, operation by operation: nothing is converted or exported.

In 8 bits, convolutions read what the one before wrote as 256 steps between the lowest and highest value seen on frames
of the package; those of the finest tones (`InferencePlan.finest`) and whatever reads the audio as it comes stay bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset15 as op
from torch import Tensor

from lipsync.engine.cores import n_cores
from lipsync.engine.plan import Conv, InferencePlan
from lipsync.engine.runtime import FaceSet, UInt8

Node = Any
"""An `ov.Output` or `ov.Node`: OpenVINO's functions take and give either."""
Features = list[npt.NDArray[Any]]
"""Encoder levels of one frame, as bf16 in whatever type numpy shows them."""

PRECISION_HINTS = {"int8": "bf16", "bf16": "bf16", "float32": "f32"}
RANGE_MARGIN = 1.2
"""How much further than on the sample frames 8-bit layers reach. Costs under 1 dB, and other speech is louder."""
N_STRIPS = 8
"""Row strips of the last step up. From 4 to 16 take equally long; without strips, 3 ms more of 45."""
CORES_A_FRAME = 2
"""Cores for each of several frames side by side. On two cores one frame at a time takes 7% longer than two side by side
on a core each, and 100 MB less."""
BF16_BYTES = 2


@functools.cache
def core() -> Any:
    """OpenVINO's entry, one a process."""
    return ov.Core()


def openvino_names() -> tuple[str, ...]:
    """What OpenVINO offers on this CPU, best first."""
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "openvino-int8", "openvino-bf16", "openvino-float32"
    return ("openvino-float32",)


class OpenVinoOps:
    """The operations of a plan, as nodes of an OpenVINO graph."""

    n_strips = N_STRIPS

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._ranges = ranges

    def conv(self, x: Node, conv: Conv, *, relu: bool = False, rows_padded: tuple[int, int] | None = None) -> Node:
        above, below = rows_padded or (conv.padding, conv.padding)
        where = (list(conv.stride), [above, conv.padding], [below, conv.padding], [1, 1])
        weight = conv.weight.numpy()
        if conv.groups > 1:
            n_out, n_in, *size = weight.shape
            weight = weight.reshape(conv.groups, n_out // conv.groups, n_in, *size)
        kernel = op.constant(weight)
        if conv.name in self._ranges:
            x = _in_8_bits(x, *self._ranges[conv.name])
            kernel = _weights_in_8_bits(weight, n_channel_axes=1 if conv.groups == 1 else 2)
        convolve = op.convolution if conv.groups == 1 else op.group_convolution
        y = op.add(convolve(x, kernel, *where), op.constant(conv.bias.numpy().reshape(1, -1, 1, 1)))
        return op.relu(y) if relu else y

    def add(self, x: Node, y: Node) -> Node:
        return op.add(x, y)

    def concat(self, x: Node, y: Node) -> Node:
        return op.concat([x, y], 1)

    def rows(self, x: Node, start: int, stop: int) -> Node:
        return op.slice(x, _ints(start), _ints(stop), _ints(1), _ints(2))

    def join_rows(self, strips: list[Node]) -> Node:
        return op.concat(strips, 2)

    def twice_the_size(self, x: Node) -> Node:
        return op.interpolate(
            x,
            op.constant(np.array([2, 2], np.float32)),
            "linear_onnx",
            "scales",
            coordinate_transformation_mode="align_corners",
            axes=_ints(2, 3),
        )

    def mask(self, x: Node, mask: Tensor) -> Node:
        return op.multiply(x, op.constant(mask.numpy()))

    def sigmoid_255(self, x: Node) -> Node:
        return op.multiply(op.sigmoid(x), op.constant(np.float32(255)))


def _ints(*values: int) -> Node:
    return op.constant(np.array(values, np.int64))


def _in_8_bits(x: Node, low: float, high: float) -> Node:
    """256 steps from `low` to `high`, with zero on one of them, so that padding stays zero."""
    low, high = low * RANGE_MARGIN, max(high * RANGE_MARGIN, 1e-6)
    step = (high - low) / 255
    zero = round(-low / step)
    bounds = [op.constant(np.float32(steps * step)) for steps in (-zero, 255 - zero)]
    return op.fake_quantize(x, *bounds, *bounds, 256)


def _weights_in_8_bits(weight: npt.NDArray[np.float32], n_channel_axes: int) -> Node:
    """255 steps between minus and plus the largest weight of each output channel, in the form that OpenVINO's 8-bit
    convolutions take as it is: integers, times a scale a channel."""
    axes = tuple(range(n_channel_axes, weight.ndim))
    scale = np.maximum(np.abs(weight).max(axis=axes, keepdims=True), np.float32(1e-12)) / np.float32(127)
    steps = np.round(weight / scale).astype(np.int8)
    return op.multiply(op.convert(op.constant(steps), "f32"), op.constant(scale))


class _Requests:
    """One frame's way through the network at a time: all of it, or what comes after kept features."""

    def __init__(self, whole: Any, rest: Any | None) -> None:
        self._whole = _with_inputs(whole.create_infer_request())
        self._rest = None if rest is None else _with_inputs(rest.create_infer_request())
        self._running: Any = None

    def start(self, face: UInt8, window: npt.NDArray[np.float32], features: Features | None) -> None:
        """Begin. face: (size, size, 3) uint8 RGB."""
        self._running = self._whole if features is None else self._rest
        for i, value in enumerate((face[None], window[None], *(features or ()))):
            self._running.get_input_tensor(i).data[:] = value
        self._running.start_async()

    def wait(self) -> tuple[UInt8, Features]:
        """The moved face, and the features to keep, if they were computed."""
        self._running.wait()
        outputs = [self._running.get_output_tensor(i).data.copy() for i in range(len(self._running.model_outputs))]
        return outputs[0][0], outputs[1:]


def _with_inputs(request: Any) -> Any:
    for i, port in enumerate(request.model_inputs):
        request.set_input_tensor(i, ov.Tensor(port.get_element_type(), port.get_shape()))
    return request


class OpenVinoRuntime:
    """A single frame goes through on all cores. Where there are many cores, several frames go side by side on a few
    each: the network's small layers cannot use more.

    With a feature budget, what the encoder makes of a frame is kept, from the finest level down for which all frames
    fit: a frame that comes again skips that part of the network.
    """

    resizes = False
    device = "cpu"

    def __init__(
        self,
        plan: InferencePlan[Node],
        faces: FaceSet,
        precision: str,
        ranges: Mapping[str, tuple[float, float]],
        *,
        feature_budget_bytes: int = 0,
        n_side_by_side: int | None = None,
    ) -> None:
        """`n_side_by_side`: frames at a time; by default one for every CORES_A_FRAME cores."""
        self._faces = faces
        self._precision = precision
        fine = (*plan.finest, "audio.0.expand")
        ops = OpenVinoOps({name: bounds for name, bounds in ranges.items() if not name.startswith(fine)})
        kept = range(_first_kept_level(plan, len(faces), feature_budget_bytes), plan.n_levels)
        self._keeps_features = len(kept) > 0
        self._features: dict[int, Features] = {}
        graphs = [_graph(plan, ops, faces, kept_levels=kept, kept_given=False)]
        if kept:
            graphs.append(_graph(plan, ops, faces, kept_levels=kept, kept_given=True))
        n = n_side_by_side or max(1, n_cores() // CORES_A_FRAME)
        (self._alone,) = self._compile(graphs, 1)
        self._side_by_side = self._compile(graphs, n) if n > 1 else [self._alone]
        copies = len(graphs) * (1 if n == 1 else 2)
        self._weight_bytes = plan.n_weights * {"int8": 1, "bf16": 2, "float32": 4}[precision] * copies

    def _compile(self, graphs: list[Any], n_streams: int) -> list[_Requests]:
        hints = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[self._precision],
            "INFERENCE_NUM_THREADS": n_cores(),
            "NUM_STREAMS": n_streams,
        }
        whole, *rest = [core().compile_model(graph, "CPU", hints) for graph in graphs]
        return [_Requests(whole, rest[0] if rest else None) for _ in range(n_streams)]

    @property
    def largest_useful_batch(self) -> int:
        return len(self._side_by_side)

    @property
    def name(self) -> str:
        return f"openvino-{self._precision}"

    @property
    def optimizations(self) -> tuple[str, ...]:
        low = () if self._precision == "float32" else (self._precision,)
        kept = ("encoder_features",) if self._keeps_features else ()
        beside = ("frames_side_by_side",) if self.largest_useful_batch > 1 else ()
        return ("openvino", *low, "folded_batch_norms", "composed_convolutions", "row_strips", *beside, *kept)

    @property
    def nbytes(self) -> int:
        return self._weight_bytes + sum(level.nbytes for levels in list(self._features.values()) for level in levels)

    def run(self, frame_ids: Sequence[int], windows: Tensor, *, alone: Collection[int] = ()) -> list[UInt8]:
        requests = self._side_by_side if len(frame_ids) > 1 else [self._alone]
        moved: list[UInt8] = []
        for first in range(0, len(frame_ids), len(requests)):
            part = frame_ids[first : first + len(requests)]
            for request, frame_id, window in zip(requests, part, windows[first:].numpy(), strict=False):
                request.start(self._faces.face(frame_id).numpy(), window, self._features.get(frame_id))
            for request, frame_id in zip(requests, part, strict=False):
                face, features = request.wait()
                if features:
                    self._features[frame_id] = features
                moved.append(face)
        return moved

    def own(self, frame_id: int, *, alone: bool = False) -> UInt8:
        return self._faces.face(frame_id).numpy()


def _first_kept_level(plan: InferencePlan[Node], n_frames: int, budget_bytes: int) -> int:
    """The finest level from which on all frames' features fit into the budget; `n_levels` if none does."""
    first, total = plan.n_levels, 0
    while first > 1:
        total += n_frames * BF16_BYTES * int(np.prod(plan.level_shape(first - 1)))
        if total > budget_bytes:
            break
        first -= 1
    return first


def _graph(plan: InferencePlan[Node], ops: OpenVinoOps, faces: FaceSet, *, kept_levels: range, kept_given: bool) -> Any:
    """Inputs: face, window, and the kept levels if given. Outputs: the moved face, and the kept levels if not."""
    size = faces.geometry.face_size
    face = op.parameter([1, size, size, 3], ov.Type.u8)
    window = op.parameter([1, *faces.window_shape], ov.Type.f32)
    given = [op.parameter([1, *plan.level_shape(i)], ov.Type.bf16) for i in kept_levels] if kept_given else []
    x = op.transpose(op.convert(face, "f32"), _ints(0, 3, 1, 2))
    levels = plan.encode(ops, x, kept_levels.start if kept_given else plan.n_levels)
    levels += [op.convert(level, "f32") for level in given]
    moved = plan.decode(ops, levels, window, faces.window_shape[1:])
    # To integers by truncation, as in training.
    outputs = [op.convert(op.transpose(moved, _ints(0, 2, 3, 1)), "u8")]
    if not kept_given:
        outputs += [op.convert(levels[i], "bf16") for i in kept_levels]
    return ov.Model(outputs, [face, window, *given], "lipsync")
