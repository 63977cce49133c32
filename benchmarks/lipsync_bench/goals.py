"""The figures that the work is held against, made of the samples."""

from __future__ import annotations

from dataclasses import dataclass

from lipsync_bench.measures.encoder import ENCODER, OPENCV, SPLICED
from lipsync_bench.measures.lifecycle import LAST_FRAME, LOAD, LOADED, MEMORY
from lipsync_bench.measures.network import NETWORK, ONNX_RUNTIME
from lipsync_bench.measures.quality import BEFORE_JPEG, QUALITY
from lipsync_bench.measures.single import SINGLE, TOTAL
from lipsync_bench.measures.throughput import STREAMS, callers_variant
from lipsync_bench.results import OURS, REFERENCE, Results


@dataclass(frozen=True)
class Goal:
    """What a figure of `Results.ratios` is, and what it must reach on two cores."""

    meaning: str
    at_least: float
    unit: str = "times"


GOALS = {
    "single_frame": Goal("single call end to end, reference over ours", 12),
    "network_vs_onnxruntime": Goal("network alone, ONNX Runtime float32 over ours", 2),
    "encode_composite": Goal("composite and encode, OpenCV's whole frame over ours", 8),
    "load": Goal("LoadPackage, reference over ours", 2.5),
    "load_whole": Goal("LoadPackage to the last frame, reference over ours", 2.5),
    "memory": Goal("resident memory after traffic, reference over ours", 3),
    "stream_fps": Goal("one gRPC stream, sustained", 45, "frames/s"),
    "psnr_db": Goal("against the reference's float32 composite, before JPEG, face alone, worst frame", 45, "dB"),
}


def fill_ratios(results: Results, best_runtime: str) -> None:
    """Set `results.ratios` from the medians; what was not measured stays out."""

    def ratio(measure: str, slower: tuple[str, str], faster: tuple[str, str]) -> float | None:
        above, below = results.median(measure, *slower), results.median(measure, *faster)
        return None if above is None or below is None else above / below

    quality = results.find(QUALITY, OURS, BEFORE_JPEG)
    found = {
        "single_frame": ratio(SINGLE, (REFERENCE, TOTAL), (OURS, TOTAL)),
        "network_vs_onnxruntime": ratio(NETWORK, (ONNX_RUNTIME, "one frame"), (best_runtime, "one frame")),
        "encode_composite": ratio(ENCODER, (OPENCV, "a frame"), (SPLICED, "a frame")),
        "load": ratio(LOAD, (REFERENCE, LOADED), (OURS, LOADED)),
        "load_whole": ratio(LOAD, (REFERENCE, LAST_FRAME), (OURS, LAST_FRAME)),
        "memory": ratio(MEMORY, (REFERENCE, "RSS after traffic"), (OURS, "RSS after traffic")),
        "stream_fps": results.median(STREAMS, OURS, callers_variant(1)),
        "psnr_db": min(quality.samples) if quality is not None and quality.samples else None,
    }
    results.ratios = {name: value for name, value in found.items() if value is not None}
