"""The figures that the work is held against, made of the samples."""

from __future__ import annotations

from dataclasses import dataclass

from lipsync_bench.measures.encoder import ENCODER, OPENCV, SPLICED
from lipsync_bench.measures.lifecycle import LAST_FRAME, LOAD, LOADED, MEMORY
from lipsync_bench.measures.live import FIRST_FRAME, FULL_WIDTH, INTERRUPT, LIVE, SUSTAINED
from lipsync_bench.measures.network import NETWORK, ONNX_RUNTIME
from lipsync_bench.measures.quality import BEFORE_JPEG, QUALITY
from lipsync_bench.measures.single import SINGLE, TOTAL
from lipsync_bench.measures.throughput import STREAMS, callers_variant
from lipsync_bench.measures.websocket import MANY, OLD_SERVERS, ONE, OldServer
from lipsync_bench.results import OURS, REFERENCE, Results


@dataclass(frozen=True)
class Goal:
    """What a figure of `Results.ratios` is, and what it must reach on two cores.

    `bound` is the least that it may be, or, where `less_is_better`, the most.
    """

    meaning: str
    bound: float
    unit: str = "times"
    less_is_better: bool = False

    def reached(self, value: float) -> bool:
        """Whether a figure is good enough."""
        return value <= self.bound if self.less_is_better else value >= self.bound

    @property
    def wanted(self) -> str:
        """The bound, for people."""
        return f"{'at most ' if self.less_is_better else ''}{self.bound:g} {self.unit}"


OLD_SERVER_FIGURES = {
    f"{key}_{suffix}": (server, measure, what)
    for key, server in OLD_SERVERS.items()
    for suffix, measure, what in (("latency", ONE, "a request"), ("fps", MANY, "frames a second"))
}
"""Of each of the older servers: what a gain over it is measured by, and what that is."""

GOALS = {
    "single_frame": Goal("single call end to end, reference over ours", 12),
    "network_vs_onnxruntime": Goal("network alone, ONNX Runtime float32 over ours", 2),
    "encode_composite": Goal("composite and encode, OpenCV's whole frame over ours", 8),
    "load": Goal("LoadPackage, reference over ours", 2.5),
    "load_whole": Goal("LoadPackage to the last frame, reference over ours", 2.5),
    "memory": Goal("resident memory after traffic, reference over ours", 3),
    "stream_fps": Goal("one gRPC stream, sustained", 45, "frames/s"),
    "live_first_frame": Goal("live audio, full width: first frame after its audio", 150, "ms", less_is_better=True),
    "live_interrupt": Goal("live audio, full width: interrupt to rest", 40, "ms", less_is_better=True),
    "live_fps": Goal("live audio, full width: one session, audio ahead", 25, "frames/s"),
    "psnr_db": Goal("against the reference's float32 composite, before JPEG, face alone, worst frame", 45, "dB"),
    **{
        name: Goal(f"older WebSocket server, {server.name}: {what}, gain of ours over that of the reference", 1)
        for name, (server, _, what) in OLD_SERVER_FIGURES.items()
    },
}


def fill_ratios(results: Results, best_runtime: str) -> None:
    """Set `results.ratios` from the medians; what was not measured stays out."""

    def ratio(measure: str, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        above, below = results.median(measure, *one), results.median(measure, *other)
        return None if above is None or below is None else above / below

    def gain_ratio(server: OldServer, measure: str) -> float | None:
        ours, theirs = (server.gain(results, measure, subject) for subject in (OURS, REFERENCE))
        return None if ours is None or theirs is None else ours / theirs

    quality = results.find(QUALITY, OURS, BEFORE_JPEG)
    found = {
        "single_frame": ratio(SINGLE, (REFERENCE, TOTAL), (OURS, TOTAL)),
        "network_vs_onnxruntime": ratio(NETWORK, (ONNX_RUNTIME, "one frame"), (best_runtime, "one frame")),
        "encode_composite": ratio(ENCODER, (OPENCV, "a frame"), (SPLICED, "a frame")),
        "load": ratio(LOAD, (REFERENCE, LOADED), (OURS, LOADED)),
        "load_whole": ratio(LOAD, (REFERENCE, LAST_FRAME), (OURS, LAST_FRAME)),
        "memory": ratio(MEMORY, (REFERENCE, "RSS after traffic"), (OURS, "RSS after traffic")),
        "stream_fps": results.median(STREAMS, OURS, callers_variant(1)),
        "live_first_frame": results.median(LIVE, FULL_WIDTH, FIRST_FRAME),
        "live_interrupt": results.median(LIVE, FULL_WIDTH, INTERRUPT),
        "live_fps": results.median(LIVE, FULL_WIDTH, SUSTAINED),
        "psnr_db": min(quality.samples) if quality is not None and quality.samples else None,
        **{name: gain_ratio(server, measure) for name, (server, measure, _) in OLD_SERVER_FIGURES.items()},
    }
    results.ratios = {name: value for name, value in found.items() if value is not None}
