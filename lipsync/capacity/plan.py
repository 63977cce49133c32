"""From costs and a target to machines: what each resource needs, which of them decides, and what is left of the others.

All formulas are of averages: fluctuations have to fit into the room that is left free (`Target.use` and the like). How
models spread, wait and make room is what `lipsync.capacity.simulation` looks at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lipsync.capacity.costs import Costs
from lipsync.capacity.traffic import shares
from lipsync.cluster.routing import FRAMES_OF_SESSION
from lipsync.errors import ConfigError

OVERHEAD = 1.05
"""Bytes on the wire for each of a JPEG: message, HTTP/2, TLS, TCP and IP; an assumption."""
AUDIO_BYTES_PER_S = 32_000
"""That a stream takes in: 16 kHz, 16 bits."""
BUSY = 0.9
"""Share of what a replica carries from which on it counts as busy, and copies of its models are made. Well above the
planned use: at that, every second replica would be busy, and have all of its models copied."""
MB, GB = 1e6, 1e9


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be served.

    Attributes:
        people: models that there are.
        streams: at a time.
        fps: frames a second of each.
        speaking: share of a stream's time in which the person speaks; in the rest the mouth rests, which takes no
            network.
        resident: share of the people who are kept in memory, the most popular first; the others are loaded when
            somebody asks for them.
        zipf: exponent of their popularity.
        copies: replicas that have a person who is in memory, at least, so that one may be lost.
        use: of GPUs and cores, that is planned with; the rest is room for fluctuations.
        network_use, memory_use: the same of those.
        spare: machines more than it takes, for those that fail.
    """

    people: int
    streams: int
    fps: float = 25.0
    speaking: float = 0.6
    resident: float = 1.0
    zipf: float = 1.0
    copies: int = 1
    use: float = 0.7
    network_use: float = 0.7
    memory_use: float = 0.9
    spare: int = 1

    def __post_init__(self) -> None:
        for name, least in (("people", 1), ("streams", 1), ("copies", 1), ("spare", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("use", "network_use", "memory_use"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name):g}; expected more than 0, and 1 at most")
        for name in ("speaking", "resident"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name):g}; expected 0 to 1")
        if not (self.fps > 0 and self.zipf >= 0):
            raise ConfigError(f"fps is {self.fps:g} and zipf {self.zipf:g}; expected more than 0, and 0 or more")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One of the machines, all alike.

    Attributes:
        cores: of its CPU, each like those that costs were measured on.
        memory_gb, network_gbits: that it has; sent and received have as much each.
        gpus: each with a replica, and each like the one that costs were measured on; without any there is one replica.
        gpu_memory_gb: of each.
        price_per_hour: in whatever currency; None leaves money out.
    """

    cores: int
    memory_gb: float
    network_gbits: float
    gpus: int = 0
    gpu_memory_gb: float = 0.0
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.cores < 1 or self.gpus < 0 or not (self.memory_gb > 0 and self.network_gbits > 0):
            raise ConfigError("a machine has at least a core, and memory and a network of more than 0")
        if self.gpus and not self.gpu_memory_gb > 0:
            raise ConfigError("gpu_memory_gb is missing; say how much memory each GPU has")

    @property
    def replicas(self) -> int:
        """Engines on it."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Need:
    """What one resource has to give.

    Attributes:
        resource: "GPU", "CPU", "memory", "GPU memory", "network".
        amount: needed in all, in `unit`.
        each: that a machine has.
        use: share of it that is planned with.
    """

    resource: str
    unit: str
    amount: float
    each: float
    use: float

    @property
    def machines(self) -> int:
        """That it takes for this alone: amount / (each x use), rounded up."""
        return max(1, math.ceil(self.amount / (self.each * self.use)))

    def used(self, n_machines: int) -> float:
        """Share of it in use, on so many machines: amount / (machines x each)."""
        return self.amount / (n_machines * self.each)


@dataclass(frozen=True)
class Plan:
    """What it takes.

    Attributes:
        needs: of every resource.
        machines: the most that any of them takes; spare ones not counted.
        spare: machines more.
        copies: models in memory, those counted that are in the memory of several replicas once for each.
        streams_per_replica: that keep one fully busy, by its GPU or CPU.
        sent_gbits, received_gbits: of all streams together.
        core_ms: of a second of a stream, by what it is for.
    """

    target: Target
    machine: Machine
    needs: tuple[Need, ...]
    machines: int
    spare: int
    copies: float
    streams_per_replica: float
    sent_gbits: float
    received_gbits: float
    core_ms: dict[str, float]

    @property
    def bottleneck(self) -> Need:
        """The resource that decides."""
        return max(self.needs, key=lambda need: need.amount / (need.each * need.use))

    @property
    def replicas(self) -> int:
        """Engines on all machines, the spare ones too."""
        return (self.machines + self.spare) * self.machine.replicas

    @property
    def models_mb(self) -> float:
        """Memory for models, of a replica: the setting models_budget_mb, in MB of 10^6 bytes."""
        memory = next(need for need in self.needs if need.resource == "memory")
        return memory.each * GB / MB / self.machine.replicas

    @property
    def max_sessions(self) -> int:
        """Streams that a replica takes: those that keep it fully busy. The setting max_sessions."""
        return max(1, math.floor(self.streams_per_replica))

    @property
    def target_queue(self) -> int:
        """The setting ray_target_queue: sessions of a replica that is nearly full, each as many frames as `choose`
        counts it for."""
        return max(1, round(self.streams_per_replica * BUSY * FRAMES_OF_SESSION))

    @property
    def min_replicas(self) -> int:
        """As many as have memory for the models: a number that follows the load alone would lose them at night."""
        memory = max(need.machines for need in self.needs if "memory" in need.resource)
        return min(memory * self.machine.replicas, self.replicas)

    @property
    def price_per_hour(self) -> float | None:
        """machines x price, the spare ones too."""
        price = self.machine.price_per_hour
        return None if price is None else price * (self.machines + self.spare)

    @property
    def streams_at_most(self) -> float:
        """That all but the spare machines carry with every resource but memory at its planned use."""
        factors = [need.use / need.used(self.machines) for need in self.needs if "memory" not in need.resource]
        return self.target.streams * min(factors)


def make_plan(costs: Costs, target: Target, machine: Machine) -> Plan:
    """Reckon what it takes. Raises ConfigError if a machine cannot do it at all, or costs are of another kind of it.

    GPU: streams x fps x speaking x network_ms.
    CPU: streams x fps x (finish_ms + transport_ms + speaking x hear_ms), and without GPUs speaking x network_ms too:
    only frames that speak need the network and the ear, all are composited, encoded and sent.
    Memory: copies x model_mb, in what the replicas' processes leave of it. Network: streams x fps x frame_bytes.
    """
    if costs.on_gpu != bool(machine.gpus):
        measured, has = ("a GPU", "none") if costs.on_gpu else ("a CPU", "GPUs")
        raise ConfigError(f"costs were measured on {measured}, and the machines have {has}; they must be alike")
    frames_per_s = target.streams * target.fps
    spoken_per_s = frames_per_s * target.speaking
    core_ms = {
        "composite and encode": target.fps * costs.finish_ms.value,
        "transport": target.fps * costs.transport_ms.value,
        "hearing": target.fps * target.speaking * costs.hear_ms.value,
    }
    needs = []
    network_s = spoken_per_s * costs.network_ms.value / 1000
    if machine.gpus:
        needs.append(Need("GPU", "GPUs", network_s, machine.gpus, target.use))
    else:
        core_ms = {"network": target.fps * target.speaking * costs.network_ms.value, **core_ms}
    cores = target.streams * sum(core_ms.values()) / 1000
    needs.append(Need("CPU", "cores", cores, machine.cores, target.use))
    busiest = max(need.amount / need.each for need in needs)  # machines that computing keeps fully busy
    streams_per_replica = target.streams / (busiest * machine.replicas)
    copies = expected_copies(target, streams_per_replica * target.use)
    free_gb = machine.memory_gb * target.memory_use - machine.replicas * costs.process_mb.value * MB / GB
    if free_gb <= costs.model_mb.value * MB / GB:
        raise ConfigError(
            f"a machine with {machine.memory_gb:g} GB has no room for a model of {costs.model_mb.value:.0f} MB beside "
            f"{machine.replicas} processes of {costs.process_mb.value:.0f} MB; take a larger one"
        )
    needs.append(Need("memory", "GB", copies * costs.model_mb.value * MB / GB, free_gb, 1.0))
    if machine.gpus:
        gpu_gb = copies * costs.gpu_model_mb.value * MB / GB
        needs.append(Need("GPU memory", "GB", gpu_gb, machine.gpus * machine.gpu_memory_gb, target.memory_use))
    sent_gbits = frames_per_s * costs.frame_bytes.value * OVERHEAD * 8 / GB
    needs.append(Need("network", "Gbit/s", sent_gbits, machine.network_gbits, target.network_use))
    return Plan(
        target=target,
        machine=machine,
        needs=tuple(needs),
        machines=max(need.machines for need in needs),
        spare=target.spare,
        copies=copies,
        streams_per_replica=streams_per_replica,
        sent_gbits=sent_gbits,
        received_gbits=target.streams * AUDIO_BYTES_PER_S * OVERHEAD * 8 / GB,
        core_ms=core_ms,
    )


def expected_copies(target: Target, streams_per_copy: float) -> float:
    """How many models are in memory, copies counted.

    A model with n streams on average needs n / streams_per_copy copies, rounded up, and Target.copies at least. One
    that is kept has them always; one that is not while it has streams at all, which for streams that come at random is
    1 - e^-n of the time.
    """
    n_kept = round(target.resident * target.people)
    copies = 0.0
    for rank, share in enumerate(shares(target.people, target.zipf)):
        n = share * target.streams
        least = 1.0 if rank < n_kept else -math.expm1(-n)
        copies += max(least * target.copies, math.ceil(n / streams_per_copy) if n > streams_per_copy else 0.0)
    return copies


def assumptions(plan: Plan, costs: Costs) -> list[str]:
    """What the plan takes for granted, one by one; figures that are assumed have their own place in `Costs`."""
    target = plan.target
    of = "GPUs and cores" if plan.machine.gpus else "cores"
    return [
        f"a stream takes {target.fps:g} frames a second for all of its time; in {target.speaking:.0%} of it the person "
        "speaks, and only those frames go through the network",
        f"frames are whole ones, {costs.frame_bytes.value / 1000:.0f} kB each, and no frame is answered from the cache "
        f"of finished ones; on the wire each takes {OVERHEAD - 1:.0%} more than its JPEG",
        f"the machines' {of} are like those that were measured, and n of them carry n times as much",
        f"the k-th most popular person has a share of the streams proportional to 1 / k^{target.zipf:g}; "
        f"{target.resident:.0%} of the people are kept in memory at all times",
        "everything is an average: what is over it for a moment has to fit into the "
        f"{1 - target.use:.0%} of {of} and the "
        f"{1 - target.network_use:.0%} of the network that are left free",
        f"{target.spare} of the machines may fail at a time",
        "servers in front of the replicas, and packages read when models are loaded, are not in it",
    ]
