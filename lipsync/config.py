"""Every setting, in one place: its default, its meaning, its unit.

`lipsync.cli` builds these once, from the command line, `LIPSYNC_*` variables and a file, and passes them down whole.
Nothing below reads the environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lipsync.errors import ConfigError

MIB = 1024 * 1024
MODEL_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")
"""What a model may be called."""
ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")
"""Of a page, as browsers write it."""
BLENDS = ("hard", "feather", "matched")
"""How a face may meet the frame around it."""
BACKENDS = ("local", "ray")
"""What may stand behind the server: an engine in its process, or engines in a Ray cluster."""
LOG_FORMATS = ("auto", "text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
TIMEOUTS = (
    "max_call_s",
    "handshake_timeout_s",
    "message_timeout_s",
    "idle_timeout_s",
    "keepalive_s",
    "send_timeout_s",
)
JPEG_QUALITIES = range(1, 96)
"""Above 95 a JPEG only grows (libjpeg's own advice)."""


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with its description, for the table in the README and `--help`."""
    return field(default=default, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How frames are made."""

    device: str = setting("auto", "Where the network runs: auto, cpu, cuda or cuda:N.")
    runtime: str = setting(
        "auto", "How the network runs: auto, openvino, torch or cuda, or one in full, as in openvino-bf16."
    )
    max_batch_size: int = setting(
        8, "Frames that go through the network together, at most; a CPU takes one for every two cores."
    )
    max_batch_delay_ms: float = setting(
        0.0, "How long, after a batch, a GPU waits for its callers to be back and fill the next one, at most."
    )
    max_queue_size: int = setting(
        512,
        "Frames that may wait, of all callers together; beyond it calls are refused, but for streams that keep to the "
        "video's pace and came while there was time for them.",
    )
    min_free_mb: int = setting(
        128, "MiB of memory that stay free: below it frames and sessions are refused, but for such streams; 0 never."
    )
    max_models: int = setting(32, "Models that may be loaded at a time.")
    models_budget_mb: int = setting(
        0,
        "MiB that all loaded models may take together: beyond it, those not used for longest and not in use make room; "
        "0 means no limit.",
    )
    pinned: tuple[str, ...] = setting((), "Models that never make room for others.")
    load_on_demand: bool = setting(
        False, "Load a package of the folder of models when a frame of it is asked for, instead of answering NOT_FOUND."
    )
    reload_s: float = setting(
        0.0,
        "How often packages on disk are looked at, in seconds: one that was replaced is loaded anew. 0 never looks.",
    )
    jpeg_quality: int = setting(90, "JPEG quality where a request names none, 1 to 95.")
    blend: str = setting(
        "matched",
        "How a face meets the frame around it: feather (a soft border), matched (its colour fitted to the frame's too) "
        "or hard (as in training: a square shows where the network is off).",
    )
    encode_threads: int = setting(0, "Threads that composite and encode; 0 means one a core.")
    memory_budget_mb: int = setting(
        0, "MiB that a model may fill with what its encoder makes of frames, its face crops included; 0 keeps none."
    )
    result_cache_mb: int = setting(
        128, "MiB of finished frames, of all models together, that are kept for whoever asks again; 0 keeps none."
    )
    prepared_cache: str = setting(
        "",
        "Folder where decoded videos and prepared frames are kept, mapped into memory: processes of one machine share "
        "them, and a restart does not decode again. Empty: each process has its own, in memory.",
    )
    prepared_cache_mb: int = setting(
        10240,
        "MiB that this folder may hold: to make room, what no process uses goes, unused longest first; what still does "
        "not fit stays in memory. 0 means no limit.",
    )
    audio_encoder: str = setting(
        "", "Checkpoint of the audio encoder for live audio to models whose packages have none of their own."
    )
    max_sessions: int = setting(64, "Sessions of live audio that may be open at a time.")
    session_audio_s: float = setting(
        120.0, "Seconds of audio of a session that may wait to be shown; beyond it no more is read from its client."
    )
    session_idle_s: float = setting(
        60.0, "Seconds after which a session ends for which no audio comes, and none is left to be shown."
    )

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device is {self.device!r}; expected auto, cpu, cuda or cuda:N",
        )
        require(
            re.fullmatch(r"auto|(openvino|torch|cuda)(-[a-z0-9]+)?", self.runtime) is not None,
            f"runtime is {self.runtime!r}; expected auto, openvino, torch or cuda, or one in full: openvino-bf16",
        )
        require(self.memory_budget_mb >= 0, f"memory_budget_mb is {self.memory_budget_mb}; expected 0 or more")
        require(self.max_batch_size >= 1, f"max_batch_size is {self.max_batch_size}; expected at least 1")
        require(
            0 <= self.max_batch_delay_ms <= 1000,
            f"max_batch_delay_ms is {self.max_batch_delay_ms:g}; expected 0 to 1000",
        )
        require(
            self.max_queue_size >= self.max_batch_size,
            f"max_queue_size is {self.max_queue_size}; expected at least max_batch_size ({self.max_batch_size})",
        )
        require(self.min_free_mb >= 0, f"min_free_mb is {self.min_free_mb}; expected 0 or more")
        require(self.max_models >= 1, f"max_models is {self.max_models}; expected at least 1")
        require(self.models_budget_mb >= 0, f"models_budget_mb is {self.models_budget_mb}; expected 0 or more")
        require(self.reload_s >= 0, f"reload_s is {self.reload_s:g}; expected 0 or more")
        require(self.jpeg_quality in JPEG_QUALITIES, f"jpeg_quality is {self.jpeg_quality}; expected 1 to 95")
        require(self.blend in BLENDS, f"blend is {self.blend!r}; expected {', '.join(BLENDS[:-1])} or {BLENDS[-1]}")
        require(self.prepared_cache_mb >= 0, f"prepared_cache_mb is {self.prepared_cache_mb}; expected 0 or more")
        require(self.max_sessions >= 1, f"max_sessions is {self.max_sessions}; expected at least 1")
        require(self.session_audio_s >= 1, f"session_audio_s is {self.session_audio_s:g}; expected at least 1")
        require(self.session_idle_s > 0, f"session_idle_s is {self.session_idle_s:g}; expected more than 0")
        require(self.encode_threads >= 0, f"encode_threads is {self.encode_threads}; expected 0 or more")
        require(self.result_cache_mb >= 0, f"result_cache_mb is {self.result_cache_mb}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How frames are served."""

    host: str = setting(
        "127.0.0.1", "Address to listen on. One that others can reach needs TLS and tokens, or `insecure`."
    )
    port: int = setting(50051, "Port to listen on; 0 takes a free one and says which.")
    http: int = setting(
        -1, "Port for browsers: the page, and WebSockets (docs/websocket.md); 0 takes a free one, -1 serves none."
    )
    legacy_http: tuple[int, ...] = setting(
        (), "More ports for the same, where clients of older WebSocket servers look for it: 8084, 8086."
    )
    http_origins: tuple[str, ...] = setting(
        (), "Origins of other pages that may connect, as in https://app.example; `*` lets all of them."
    )
    insecure: bool = setting(False, "Serve on a public address without TLS or without tokens, all the same.")
    tls_cert: str = setting("", "File with the server's certificate and those between it and its root, PEM.")
    tls_key: str = setting("", "File with the certificate's private key, PEM.")
    tls_client_ca: str = setting("", "File with the CAs, PEM, whose certificates clients must show (mutual TLS).")
    tokens: str = setting("", "File of bearer tokens and their roles. Empty: whoever can connect may do everything.")
    models: str = setting("", "Folder of model packages; LoadPackage loads from below it alone. Empty: the demo alone.")
    load: tuple[str, ...] = setting(
        (), "Models that `lipsync serve` loads at its start, of those in the folder. Empty: all of them."
    )
    max_request_bytes: int = setting(4 * MIB, "Largest message of a client, in bytes, but for batches.")
    max_message_bytes: int = setting(50 * MIB, "Largest message of a batch call, and largest answer, in bytes.")
    max_inflight_bytes: int = setting(
        256 * MIB, "Bytes of all clients' messages together that are being received; beyond it calls are refused."
    )
    max_connections: int = setting(1024, "Connections at a time; beyond it new ones are closed at once.")
    max_calls: int = setting(4096, "Calls at a time, of all clients together; beyond it each is refused.")
    max_streams: int = setting(1000, "Calls at a time on one connection; beyond it each is refused.")
    max_batch_frames: int = setting(128, "Frames of one batch call, at most.")
    stream_in_flight: int = setting(8, "Frames of one stream that are being made at a time.")
    max_call_s: float = setting(
        300.0, "Longest that a call may take that is no stream and no load, in seconds, whatever its client asks."
    )
    handshake_timeout_s: float = setting(
        10.0, "How long a client may take for the TLS handshake, and then for the first bytes of HTTP/2, in seconds."
    )
    message_timeout_s: float = setting(
        30.0,
        "How long a message may take to come in, once it began, and the one of a single call to begin, in seconds.",
    )
    idle_timeout_s: float = setting(
        60.0, "How long a connection without calls is kept, and a stream without its first message, in seconds."
    )
    keepalive_s: float = setting(
        30.0, "A connection with calls that is silent for as long is asked for a sign of life, and closed without one."
    )
    send_timeout_s: float = setting(
        60.0, "How long a client may leave an answer untaken before its call is ended, in seconds."
    )
    drain_delay_s: float = setting(
        0.0, "After SIGTERM: how long calls are still taken while health says NOT_SERVING, for load balancers."
    )
    grace_s: float = setting(10.0, "Then, how long calls in flight may finish, in seconds.")
    reflection: bool = setting(False, "Tell clients such as buf curl and grpcurl what services there are.")
    metrics: bool = setting(True, "Serve Prometheus metrics, on a port of their own.")
    metrics_host: str = setting("127.0.0.1", "Address for metrics.")
    metrics_port: int = setting(8002, "Port for metrics; 0 takes a free one and says which.")
    log_format: str = setting("auto", "text, json, or auto: text on a terminal, JSON otherwise.")
    log_level: str = setting("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"port is {self.port}; expected 0 to 65535")
        require(-1 <= self.http <= 65535, f"http is {self.http}; expected 0 to 65535, or -1 for none")
        for port in self.legacy_http:
            require(0 <= port <= 65535, f"legacy_http is {port}; expected 0 to 65535")
        for origin in self.http_origins:
            require(
                origin in ("*", "null") or ORIGIN.fullmatch(origin) is not None,
                f"http_origins has {origin!r}; expected a scheme and a host, as in https://app.example:8443",
            )
        require(
            self.max_message_bytes >= 1024, f"max_message_bytes is {self.max_message_bytes}; expected at least 1024"
        )
        require(
            self.max_request_bytes >= 1024, f"max_request_bytes is {self.max_request_bytes}; expected at least 1024"
        )
        require(
            self.max_inflight_bytes >= self.max_message_bytes,
            f"max_inflight_bytes is {self.max_inflight_bytes}; expected at least max_message_bytes",
        )
        require(self.max_connections >= 1, f"max_connections is {self.max_connections}; expected at least 1")
        require(self.max_calls >= 1, f"max_calls is {self.max_calls}; expected at least 1")
        require(1 <= self.max_streams < 2**31, f"max_streams is {self.max_streams}; expected at least 1")
        require(self.max_batch_frames >= 1, f"max_batch_frames is {self.max_batch_frames}; expected at least 1")
        require(self.stream_in_flight >= 1, f"stream_in_flight is {self.stream_in_flight}; expected at least 1")
        for name in TIMEOUTS:
            value = getattr(self, name)
            require(value > 0, f"{name} is {value:g}; expected more than 0")
        for name in ("drain_delay_s", "grace_s"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value:g}; expected 0 or more")
        require(0 <= self.metrics_port <= 65535, f"metrics_port is {self.metrics_port}; expected 0 to 65535")
        require(
            bool(self.tls_cert) == bool(self.tls_key),
            "tls_cert and tls_key belong together; one of them is missing",
        )
        require(
            not self.tls_client_ca or bool(self.tls_cert), "tls_client_ca needs the server's own tls_cert and tls_key"
        )
        require(self.log_format in LOG_FORMATS, f"log_format is {self.log_format!r}; expected {', '.join(LOG_FORMATS)}")
        require(self.log_level in LOG_LEVELS, f"log_level is {self.log_level!r}; expected {', '.join(LOG_LEVELS)}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How many processes there are, and where."""

    workers: int = setting(
        1,
        "Processes that serve together on the same ports, each with an engine of its own; 1 serves in this process "
        "alone.",
    )
    backend: str = setting(
        "local", "Where frames are made: local, an engine in the server's process; or ray, replicas in a Ray cluster."
    )
    ray_address: str = setting("", "Ray cluster to join, as host:port or auto. Empty: one on this machine, of its own.")
    ray_app: str = setting("lipsync", "Name of the Ray Serve application; servers that name the same one share it.")
    ray_min_replicas: int = setting(1, "Replicas of the engine that a Ray cluster has at all times.")
    ray_max_replicas: int = setting(1, "Replicas that it may have when many frames wait.")
    ray_gpus: float = setting(0.0, "GPUs of a replica: 1 is one replica a device.")
    ray_cpus: float = setting(1.0, "CPU cores of a replica, for Ray to place it.")
    ray_copies: int = setting(
        1, "Replicas that have each model that is used: with 2, one may be lost and nobody waits for a load."
    )
    ray_target_queue: int = setting(
        16, "Frames that may wait at a replica, on average, before another one is started, or another one used."
    )

    def __post_init__(self) -> None:
        require(1 <= self.workers <= 256, f"workers is {self.workers}; expected 1 to 256")
        require(self.backend in BACKENDS, f"backend is {self.backend!r}; expected local or ray")
        require(
            self.workers == 1 or self.backend == "local" or bool(self.ray_address),
            "several workers need a Ray cluster that they share; name it: --ray-address",
        )
        require(
            MODEL_NAME.fullmatch(self.ray_app) is not None,
            f"ray_app is {self.ray_app!r}; expected 1 to 64 characters of A-Z a-z 0-9 . _ -",
        )
        require(self.ray_min_replicas >= 1, f"ray_min_replicas is {self.ray_min_replicas}; expected at least 1")
        require(
            self.ray_max_replicas >= self.ray_min_replicas,
            f"ray_max_replicas is {self.ray_max_replicas}; expected at least ray_min_replicas "
            f"({self.ray_min_replicas})",
        )
        require(self.ray_gpus >= 0, f"ray_gpus is {self.ray_gpus:g}; expected 0 or more")
        require(self.ray_cpus >= 0, f"ray_cpus is {self.ray_cpus:g}; expected 0 or more")
        require(self.ray_copies >= 1, f"ray_copies is {self.ray_copies}; expected at least 1")
        require(self.ray_target_queue >= 1, f"ray_target_queue is {self.ray_target_queue}; expected at least 1")
