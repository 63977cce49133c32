"""`lipsync capacity`: from measured costs and a target to machines, and a simulation of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lipsync_bench.results import Results

from lipsync.capacity.costs import Costs, costs_of
from lipsync.capacity.plan import Machine, Plan, Target, assumptions, make_plan
from lipsync.cli.terminal import add_row, console, count, make_table, progress_bars
from lipsync.config import MIB

UNITS = {
    "network_ms": "ms of the device a frame that speaks",
    "finish_ms": "ms of a core a frame: composite, encode",
    "transport_ms": "ms of a core a frame: send",
    "hear_ms": "ms of a core a frame that speaks: hear",
    "frame_bytes": "bytes a frame",
    "model_mb": "MB of memory a model",
    "gpu_model_mb": "MB of GPU memory a model",
    "process_mb": "MB of memory a replica without models",
    "load_s": "s to load a model",
    "package_mb": "MB read to load a model",
}


def run_capacity(
    results: Path,
    target: Target,
    machine: Machine,
    given: dict[str, float | None],
    *,
    n_frames: int | None,
    scenario: dict[str, Any] | None,
    as_json: bool,
) -> None:
    """Print what it takes; with a scenario, what a simulation of it came to.

    Raises LipsyncError if the results, or what is asked for, cannot be used.
    """
    measured = Results.load(results)
    costs = costs_of(measured, given, n_frames=n_frames)
    plan = make_plan(costs, target, machine)
    simulated = None if scenario is None else _simulate(plan, costs, scenario)
    if as_json:
        print(json.dumps(describe(measured, costs, plan) | {"simulation": simulated}, indent=2))
        return
    _print_costs(costs, measured)
    _print_plan(plan, costs)
    if simulated is not None:
        _print_simulated(simulated, plan)


def _simulate(plan: Plan, costs: Costs, options: dict[str, Any]) -> dict[str, Any]:
    """What was simulated, and the figures."""
    from lipsync.capacity.scenario import Scenario, simulate  # the policy code comes with the engine: torch
    from lipsync.capacity.traffic import Durations

    scenario = Scenario(durations=Durations(options.pop("durations"), options.pop("mean_s")), **options)
    with progress_bars("simulating:") as on_progress:

        def on_time(now_s: float) -> None:
            on_progress("seconds", round(now_s), round(scenario.end_s))

        simulated = simulate(plan, costs, scenario, on_time=on_time)
    return {"scenario": asdict(scenario), **asdict(simulated)}


def describe(results: Results, costs: Costs, plan: Plan) -> dict[str, Any]:
    """All of a plan, for programs."""
    return {
        "measured_on": results.machine,
        "target": asdict(plan.target),
        "machine": asdict(plan.machine),
        "costs": {name: asdict(figure) for name, figure in costs.figures().items()},
        "assumptions": assumptions(plan, costs),
        "needs": [
            {
                "resource": need.resource,
                "unit": need.unit,
                "amount": need.amount,
                "a_machine_has": need.each,
                "planned_use": need.use,
                "machines": need.machines,
                "use": need.used(plan.machines),
            }
            for need in plan.needs
        ],
        "bottleneck": plan.bottleneck.resource,
        "machines": plan.machines,
        "spare_machines": plan.spare,
        "streams_at_most": plan.streams_at_most,
        "copies_in_memory": plan.copies,
        "core_ms_per_stream_second": plan.core_ms,
        "sent_gbits": plan.sent_gbits,
        "received_gbits": plan.received_gbits,
        "price_per_hour": plan.price_per_hour,
        "settings": settings(plan),
    }


def settings(plan: Plan) -> dict[str, int]:
    """What `lipsync serve --backend ray` is started with, for the machines to be used as planned."""
    return {
        "ray_min_replicas": plan.min_replicas,
        "ray_max_replicas": plan.replicas,
        "ray_target_queue": plan.target_queue,
        "max_sessions": plan.max_sessions,
        "models_budget_mb": int(plan.models_mb * 1e6 / MIB),
        "ray_copies": plan.target.copies,
    }


def _print_costs(costs: Costs, results: Results) -> None:
    machine = results.machine
    table = make_table(
        f"costs: measured on {machine.get('gpu', machine.get('cpu', 'an unknown machine'))}, given, or assumed",
        *("figure", "what", "", "from"),
        right=("figure",),
    )
    for name, figure in costs.figures().items():
        if name == "gpu_model_mb" and not costs.on_gpu:
            continue
        add_row(table, _number(figure.value), UNITS[name], figure.kind, figure.source)
    console.print(table)


def _print_plan(plan: Plan, costs: Costs) -> None:
    target, machine = plan.target, plan.machine
    has = [f"{machine.cores} cores", f"{machine.memory_gb:g} GB", f"{machine.network_gbits:g} Gbit/s"]
    if machine.gpus:
        has.insert(0, f"{count(machine.gpus, 'GPU')} of {machine.gpu_memory_gb:g} GB")
    table = make_table(
        f"{target.people:,} people, {target.streams:,} streams of {target.fps:g} frames/s; machines: {', '.join(has)}",
        *("resource", "needed", "a machine has", "planned use", "machines", f"use of {plan.machines:,}"),
        right=("needed", "a machine has", "planned use", "machines", f"use of {plan.machines:,}"),
    )
    for need in plan.needs:
        add_row(
            table,
            need.resource,
            f"{_number(need.amount)} {need.unit}",
            f"{_number(need.each)} {need.unit}",
            f"{need.use:.0%}",
            f"{need.machines:,}" + (" <" if need is plan.bottleneck else ""),
            f"{need.used(plan.machines):.0%}",
        )
    console.print(table)
    lines = [
        f"{count(plan.machines, 'machine')}, and {plan.spare} to spare; what decides is the {plan.bottleneck.resource}",
        f"room: as planned they carry {plan.streams_at_most:,.0f} streams",
        "of the cores: "
        + ", ".join(f"{name} {ms / sum(plan.core_ms.values()):.0%}" for name, ms in plan.core_ms.items()),
        f"models in memory: {plan.copies:,.0f}, copies counted",
        f"network: {plan.sent_gbits:,.1f} Gbit/s sent, {plan.received_gbits:,.1f} received",
    ]
    price = plan.price_per_hour
    if price is not None:
        lines.append(f"price: {price:,.2f} an hour, {price / target.streams:.4f} a stream and hour")
    lines.append("settings: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings(plan).items()))
    lines.append("\nassumed:")
    lines += [
        f"- {name} is {figure.value:g}: {figure.source}"
        for name, figure in costs.figures().items()
        if figure.kind == "assumed" and figure.value
    ]
    lines += [f"- {text}" for text in assumptions(plan, costs)]
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _print_simulated(simulated: dict[str, Any], plan: Plan) -> None:
    of = simulated["scenario"]
    starts = simulated["starts"] + simulated["refused"]
    table = make_table(
        f"simulated: {of['seconds']:g} s after {of['ramp_s']:g} s in which streams come and {of['settle_s']:g} s more; "
        f"{of['durations']['kind']} durations, {of['durations']['mean_s']:g} s on average; seed {of['seed']}",
        *("what", "figure"),
        right=("figure",),
    )
    rows = {
        "streams that began": f"{simulated['starts']:,}",
        "refused": f"{simulated['refused']:,} ({simulated['refused'] / starts if starts else 0:.2%})",
        "found their model in memory": f"{simulated['hit_share']:.2%}",
        "waited for a load": f"{simulated['waited']:,}",
        "  how long, p50 and p99": f"{simulated['wait_p50_s']:.1f} s, {simulated['wait_p99_s']:.1f} s",
        "loads an hour": f"{simulated['loads_per_hour']:,.0f}",
        "  copies of what is in memory": f"{simulated['copies_per_hour']:,.0f}",
        "  without room": f"{simulated['no_room']:,} in all",
        "models put out of memory an hour": f"{simulated['evictions_per_hour']:,.0f}",
        "people in memory": f"{simulated['in_memory']:,.0f} of {plan.target.people:,}",
        "  copies of each": f"{simulated['copies_mean']:.2f}",
        "replicas": f"{simulated['replicas_min']:,} to {simulated['replicas_max']:,}",
        "  busy, mean and p99": f"{simulated['busy_mean']:.0%}, {simulated['busy_p99']:.0%}",
        "streams, mean and peak": f"{simulated['streams_mean']:,.0f}, {simulated['streams_peak']:,}",
        "network, mean and peak": f"{simulated['sent_gbits']:,.1f}, {simulated['sent_peak_gbits']:,.1f} Gbit/s",
        "packages read": f"{simulated['packages_gbits']:.2f} Gbit/s",
        "replicas that failed": f"{simulated['failures']:,}",
        "  streams that went elsewhere": f"{simulated['moved']:,}, {simulated['broken']:,} found no place",
        "  how long they stood, p99": f"{simulated['move_p99_s']:.1f} s",
    }
    for what, figure in rows.items():
        add_row(table, what, figure)
    console.print(table)


def _number(value: float) -> str:
    """Three digits, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
