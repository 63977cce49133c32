"""What a server logs, and how: text for people, JSON for machines.

One record is one line, whatever a client put into it: control characters are escaped, and a traceback, which alone has
several lines in text, is set off by a bar that no record begins with. Records that come again and again are suppressed
for a while. Payloads and tokens are never told.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from lipsync.config import ServerConfig
from lipsync.transport.calls import CALL

FIELDS = ("worker", "request_id", "method", "peer", "identity", "model", "code", "duration_ms", "reason", "suppressed")
"""What a record may have beside its time, level, logger and message."""
BURST = 20
"""Records of one kind that are told in an interval; further ones are counted."""
INTERVAL_S = 10.0
MAX_KINDS = 1000
"""Kinds of records that are counted at a time."""
QUIET = {
    # at DEBUG it writes every header that comes in, tokens included
    "hpack": logging.WARNING,
    "h2": logging.WARNING,
    "hyperframe": logging.WARNING,
    # tells of each call's deadline or end again, in its own words
    "grpclib": logging.WARNING,
    # its DEBUG tells of selectors
    "asyncio": logging.INFO,
}
"""Loggers of others, which are not asked for more than this however much is asked of ours."""
BAR = "  | "
"""Before each line of a traceback in text."""


def configure(config: ServerConfig, *, worker: int | None = None, stream: TextIO | None = None) -> None:
    """Send what all loggers of this process say to a stream, by default stderr, instead of wherever it went before.

    `worker` is the number of this process, where several serve together.
    """
    stream = stream or sys.stderr
    as_text = config.log_format == "text" or (config.log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if as_text else JsonLines())
    handler.addFilter(CallFields(worker))
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    for before in root.handlers[:]:
        root.removeHandler(before)
    root.addHandler(handler)
    level = config.log_level.upper()
    root.setLevel(level)
    for name, least in QUIET.items():
        logging.getLogger(name).setLevel(max(least, logging.getLevelName(level)))


class CallFields(logging.Filter):
    """Adds whose call a record belongs to: the one that is being answered where it was written. And the worker."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = worker

    def filter(self, record: logging.LogRecord) -> bool:
        if self._worker is not None:
            record.worker = self._worker
        call = CALL.get(None)
        if call is not None:
            record.request_id, record.peer = call.request_id, call.peer
            record.method = call.path
            if call.identity:
                record.identity = call.identity
        return True


class RateLimit(logging.Filter):
    """Lets BURST records of a kind through in INTERVAL_S; the next one after that tells how many were suppressed.

    A kind is a logger, a level, a message before its values are put in, a method, a code and a reason. DEBUG is not
    limited.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts: OrderedDict[tuple[object, ...], tuple[float, int]] = OrderedDict()  # began, seen since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        now_s = self._clock()
        kind = (
            record.name,
            record.levelno,
            str(record.msg),
            getattr(record, "method", ""),
            getattr(record, "code", ""),
            getattr(record, "reason", ""),
        )
        began_s, seen = self._counts.pop(kind, (now_s, 0))
        if now_s - began_s >= INTERVAL_S:
            if seen > BURST:
                record.suppressed = seen - BURST
            began_s, seen = now_s, 0
        self._counts[kind] = (began_s, seen + 1)
        if len(self._counts) > MAX_KINDS:
            self._counts.popitem(last=False)
        return seen < BURST


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,000 INFO lipsync.engine.engine: loaded anna request_id=… method=…`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name in FIELDS if (value := getattr(record, name, None)) is not None)
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        lines = [escaped(line)]
        if record.exc_info:
            lines += [BAR + escaped(each) for each in self.formatException(record.exc_info).split("\n")]
        if record.stack_info:
            lines += [BAR + escaped(each) for each in record.stack_info.split("\n")]
        return "\n".join(lines)


def escaped(text: str) -> str:
    """Text without control characters: a terminal obeys none of them, and none begins a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class JsonLines(JsonFormatter):
    """One JSON object a line, in ASCII; fields that a record does not have are left out."""

    NAMES = {"levelname": "level", "name": "logger", "exc_info": "traceback"}

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s", rename_fields=self.NAMES, timestamp="time")

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        # whatever else a record carries is not known to be fit for a log
        known = ("time", "level", "logger", "message", *FIELDS, "traceback")
        return {name: log_data[name] for name in known if name in log_data}
