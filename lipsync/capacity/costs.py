"""What a frame, a stream and a model cost, and how that is known: measured by `lipsync bench`, given, or assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from lipsync.errors import ConfigError

OURS = "lipsync"
CORES_A_FRAME = 2
"""A CPU takes a frame for every two cores: what the network of one frame keeps busy."""
CROP_BYTES = 328 * 328 * 3
"""Of a frame's face, as a GPU keeps it."""


class Samples(Protocol):
    """One series of a results.json."""

    measure: str
    subject: str
    variant: str
    x: float | None

    @property
    def median(self) -> float: ...


class Measured(Protocol):
    """A results.json of `lipsync bench`."""

    machine: dict[str, Any]
    settings: dict[str, Any]

    def of(self, measure: str) -> Sequence[Samples]: ...

    def median(self, measure: str, subject: str, variant: str) -> float | None: ...


@dataclass(frozen=True)
class Figure:
    """A number, and where it is from: "measured", "given" or "assumed", and how."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What everything is reckoned from.

    Attributes:
        network_ms: of the device, for a frame that speaks: core-milliseconds where the device is the CPU.
        finish_ms: of a core, to composite and encode a frame.
        transport_ms: of a core, to send a frame.
        hear_ms: of a core, to hear the audio of a frame.
        frame_bytes: of a frame's JPEG.
        model_mb: of memory, for a model.
        gpu_model_mb: of a GPU's memory, for a model; 0 where there is none.
        process_mb: of memory, for a replica without models.
        load_s: until a model that is not in memory is ready to serve.
        package_mb: that are read for it, from wherever packages lie.
    """

    network_ms: Figure
    finish_ms: Figure
    transport_ms: Figure
    hear_ms: Figure
    frame_bytes: Figure
    model_mb: Figure
    gpu_model_mb: Figure
    process_mb: Figure
    load_s: Figure
    package_mb: Figure
    on_gpu: bool

    def figures(self) -> dict[str, Figure]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "on_gpu"}


ASSUMED = {
    "transport_ms": (0.7, "no transport in these results (--quick leaves it out)"),
    "hear_ms": (1.0, "the harness does not record it"),
    "package_mb": (30.0, "the harness does not record it"),
    "process_mb": (450.0, "no growth in these results (--quick leaves it out)"),
}
NETWORK_MB = 60.0
"""Of a GPU's memory, for a network and what it computes with: an assumption."""


def costs_of(results: Measured, given: Mapping[str, float | None], *, n_frames: int | None = None) -> Costs:
    """Read costs from a results.json.

    Args:
        results: of one run of the harness.
        given: figures by name, which go before what was measured; None is not given.
        n_frames: of a person's video; those of the measured package if it is None.
    Raises ConfigError if something that cannot be assumed is not in the results.
    """
    on_gpu = str(results.machine.get("device", "cpu")).startswith("cuda")
    measured_frames = int(results.settings.get("frames", 0))
    frames = n_frames or measured_frames

    def pick(name: str, found: Figure | None) -> Figure:
        value = given.get(name)
        if value is not None:
            return Figure(value, "given", "--" + name.replace("_", "-"))
        if found is not None:
            return found
        if name in ASSUMED:
            return Figure(ASSUMED[name][0], "assumed", ASSUMED[name][1])
        raise ConfigError(f"the results have no {name}; measure with lipsync bench, or give --{name.replace('_', '-')}")

    memory = _memory(results, frames)
    load_ms = results.median("load", OURS, "LoadPackage")
    load = None if load_ms is None else Figure(load_ms / 1000, "measured", f"LoadPackage, {measured_frames} frames")
    gpu_mb = frames * CROP_BYTES / 1e6 + NETWORK_MB if on_gpu else 0.0
    gpu_source = f"{frames} face crops of 328 px and {NETWORK_MB:.0f} MB" if on_gpu else "no GPU"
    return Costs(
        network_ms=pick("network_ms", _network(results, on_gpu)),
        finish_ms=pick("finish_ms", _finish(results)),
        transport_ms=pick("transport_ms", _transport(results)),
        hear_ms=pick("hear_ms", None),
        frame_bytes=pick("frame_bytes", _median(results, "frame size", OURS, "JPEG")),
        model_mb=pick("model_mb", memory[0]),
        gpu_model_mb=pick("gpu_model_mb", Figure(gpu_mb, "assumed", gpu_source)),
        process_mb=pick("process_mb", memory[1]),
        load_s=pick("load_s", load),
        package_mb=pick("package_mb", None),
        on_gpu=on_gpu,
    )


def _median(results: Measured, measure: str, subject: str, variant: str) -> Figure | None:
    value = results.median(measure, subject, variant)
    return None if value is None else Figure(value, "measured", f"{measure}, {variant}")


def _network(results: Measured, on_gpu: bool) -> Figure | None:
    """On a GPU the time between frames of the best batch size, which is the device's if nothing else holds it up. On a
    CPU the network's time of one frame, times the cores that it keeps busy."""
    if on_gpu:
        rates = {series.variant: series.median for series in results.of("engine alone")}
        if not rates:
            return None
        best = max(rates, key=lambda variant: rates[variant])
        return Figure(1000 / rates[best], "measured", f"engine alone, {best}: {rates[best]:.0f} frames/s")
    for measure, subject in (("engine alone, single frame", OURS), ("single call", OURS)):
        value = results.median(measure, subject, "inference")
        if value is not None:
            n_cores = min(CORES_A_FRAME, int(results.machine.get("cores", CORES_A_FRAME)))
            return Figure(value * n_cores, "measured", f"{measure}, inference: {value:.1f} ms on {n_cores} cores")
    return None


def _finish(results: Measured) -> Figure | None:
    alone = results.median("composite and encode", "spliced", "a frame")
    if alone is not None:
        return Figure(alone, "measured", "composite and encode, spliced, in one thread")
    steps = [results.median("single call", OURS, step) for step in ("composite", "encode")]
    if None in steps:
        return None
    return Figure(sum(step for step in steps if step is not None), "measured", "single call, composite and encode")


def _transport(results: Measured) -> Figure | None:
    """The time between frames of a stream as fast as it goes: its server has no more of a core than that for each."""
    rate = results.median("transport alone", "grpclib", "one stream")
    if rate is None:
        return None
    return Figure(1000 / rate, "measured", f"transport alone, one stream: {rate:.0f} frames/s; at most that")


def _memory(results: Measured, n_frames: int) -> tuple[Figure | None, Figure | None]:
    """Of a model, and of a process without any: two straight lines through what servers weighed.

    One through servers with 1, 2, 4 models of a quarter of the frames gives a model of that length; one through servers
    with a model of a quarter, half and all of the frames gives a frame.
    """
    by_models = _slope(results, "by models loaded")
    by_frames = _slope(results, "by frames loaded")
    if by_models is None or by_frames is None:
        loaded = results.median("memory", OURS, "USS after load")
        base = ASSUMED["process_mb"][0]
        if loaded is None or loaded <= base:
            return None, None
        return Figure(loaded - base, "measured", f"USS after load, less {base:.0f} MB that are assumed"), None
    (a_model, process), (a_frame, _) = by_models, by_frames
    quarter = int(results.settings["frames"]) // 4
    model_mb = a_model + a_frame * (n_frames - quarter)
    source = f"growth of RSS: {a_model:.0f} MB a model of {quarter} frames, {a_frame:.2f} MB a frame"
    return Figure(model_mb, "measured", source), Figure(process, "measured", "RSS without models, by that growth")


def _slope(results: Measured, measure: str) -> tuple[float, float] | None:
    """Of RSS by the number that it grows with, and where the line begins; least squares."""
    points = [
        (series.x, series.median)
        for series in results.of(measure)
        if series.subject == OURS and series.variant.startswith("RSS") and series.x is not None
    ]
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x
