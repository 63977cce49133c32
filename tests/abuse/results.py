"""What a run found: kept as JSON beside it, and written as docs/reliability.md."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

import lipsync
from tests.abuse.bystander import LATE_MS, Seen
from tests.abuse.servers import Memory, Noticed

ROOT = Path(__file__).parents[2]
HEAD = f"""\
# Reliability

Written by `make test-abuse` from what it saw, and [the part on Ray](#a-ray-cluster) by `benchmarks/ray_faults.py`; not
edited by hand. Each row is one thing that was done to a running
`lipsync serve`, with what came back. All the while another client, a process of its own with another maker's library
(grpcio), kept a strict stream of 25 frames a second and asked for health ten times a second. Each of its pictures was
held against the same frame asked for alone before; it is late if it came more than {LATE_MS:.0f} ms after it was asked
for. Server, abuser and the other client share the machine's cores: what the other client was held up itself by a busy
processor is told as its own lag, and counts for the server all the same.

The quick rows are also in `make test`, against a fake engine.
"""
AGAIN = """\
## Again

`make test-abuse` runs everything, which takes about an hour, and writes this page. `make test-abuse ROWS=12,14` runs
those rows alone and keeps what was seen of the others; `SOAK=1` makes the soak a minute.
"""


@dataclass
class Result:
    """One row's outcome.

    Attributes:
        verdict: "held", "failed" or "not run".
        seen: what came back.
        wrong: what should not have.
        noticed: of each server that was watched.
        details: figures of long rows, for a table of their own.
        traces: of a chart, by name: a value each second.
        log_lines: what the server logged meanwhile.
    """

    key: str
    title: str
    sent: str
    verdict: str = "held"
    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    noticed: list[Noticed] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0
    log_lines: int = 0
    when: str = ""
    commit: str = ""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Result:
        noticed = [Noticed(Memory(**each["memory"]), Seen(**each["seen"])) for each in saved["noticed"]]
        return cls(**{**saved, "noticed": noticed})


def load(path: Path) -> dict[str, Result]:
    """The results of a run before, by row; none if there was none."""
    if not path.exists():
        return {}
    known = {each.name for each in dataclasses.fields(Result)}
    saved = json.loads(path.read_text())
    return {each["key"]: Result.of({k: v for k, v in each.items() if k in known}) for each in saved}


def save(path: Path, results: dict[str, Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results.values()], indent=1))


def commit() -> str:
    """The short name of the commit that is checked out; "" outside of a repository."""
    command = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine() -> str:
    """What all this ran on."""
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            info[name.strip()] = value.strip()
    memory = psutil.virtual_memory().total / 2**30
    cpu = info.get("model name") or platform.processor() or platform.machine()
    return (
        f"{cpu}, {psutil.cpu_count()} cores, {memory:.0f} GiB of memory; {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}; lipsync {lipsync.__version__}."
    )


def bystander_text(seen: Seen) -> str:
    """In a cell."""
    lag = f", own lag {seen.own_lag_ms:.0f} ms" if seen.own_lag_ms > 50 else ""
    parts = [f"{seen.frames:,} frames", f"{seen.wrong} wrong"]
    if seen.failed:
        parts.append(f"{seen.failed} failed")
    if seen.broken:
        parts.append(f"stream broken {len(seen.broken)} times")
    parts.append(f"{seen.late} late")
    text = f"{', '.join(parts)}; slowest {seen.max_ms:.0f} ms, longest gap {seen.max_gap_ms:.0f} ms{lag}"
    if seen.health_failed:
        text += f"; {len(seen.health_failed)} of {seen.health + len(seen.health_failed)} health checks failed"
    return f"{text}; health {seen.health_max_ms:.0f} ms"


def memory_text(memory: Memory) -> str:
    return f"{memory.before:.0f} / {memory.peak:.0f} / {memory.after:.0f}"


OF_RAY = re.compile(r"<!-- ray -->.*<!-- end of ray -->", re.DOTALL)


def page(results: dict[str, Result], command: str, before: str = "") -> str:
    """docs/reliability.md. What benchmarks/ray_faults.py wrote is kept from the page `before`."""
    of_ray = OF_RAY.search(before)
    counted = {
        verdict: sum(r.verdict == verdict for r in results.values()) for verdict in ("held", "failed", "not run")
    }
    days = sorted({result.when for result in results.values()})
    commits = sorted({result.commit for result in results.values() if result.commit})
    ran = f"Ran {' to '.join(days[:1] + days[1:][-1:])}" + (f", at commit {' and '.join(commits)}" if commits else "")
    parts = [
        HEAD,
        f"{ran}, by `{command}`. {machine()}",
        f"**{counted['held']} rows held, {counted['failed']} failed, {counted['not run']} could not be run here.**",
        _table(results),
        *(_section(result) for result in results.values()),
        *([] if of_ray is None else [of_ray[0]]),
        AGAIN,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _table(results: dict[str, Result]) -> str:
    lines = [
        "| row | what | verdict | server's memory: before / peak / after, MB | the other client |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results.values():
        memory = "<br>".join(memory_text(each.memory) for each in result.noticed) or "-"
        seen = "<br>".join(_cell(bystander_text(each.seen)) for each in result.noticed) or "-"
        verdict = f"**{result.verdict}**" if result.verdict == "failed" else result.verdict
        lines.append(f"| [{result.key}](#{_anchor(result)}) | {_cell(result.title)} | {verdict} | {memory} | {seen} |")
    return "\n".join(lines)


def _heading(result: Result) -> str:
    return f"Row {result.key}: {result.title}"


def _anchor(result: Result) -> str:
    kept = "".join(c for c in _heading(result).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _section(result: Result) -> str:
    lines = [f"## {_heading(result)}", "", f"Sent: {result.sent}.", ""]
    if result.verdict == "not run":
        lines += [f"Not run: {'; '.join(result.wrong)}", ""]
    else:
        lines += [f"Came back, in {result.took_s:.0f} s:", "", *(f"- {_shown(each)}" for each in result.seen), ""]
        if result.wrong:
            lines += ["Wrong:", "", *(f"- **{_shown(each)}**" for each in result.wrong), ""]
        if result.details:
            lines += ["| | |", "| --- | --- |"]
            lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in result.details.items()]
    return "\n".join(lines)


def _shown(text: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text)
    for sign in "<>*_`":
        clean = clean.replace(sign, "\\" + sign)
    return clean if len(clean) <= 600 else clean[:597] + "..."
