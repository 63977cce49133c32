"""`python -m tests.abuse`: every row, against servers that it starts itself. `make test-abuse` calls this.

Exit code 1 if a row did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from lipsync.config import EngineConfig, ServerConfig
from tests.abuse.catalogue import ROWS, Row
from tests.abuse.results import ROOT, Result, bystander_text, commit, load, memory_text, page, save
from tests.abuse.rows import Findings, NotRun
from tests.abuse.servers import Bench, Noticed, Served, Watch
from tests.packages import make_package

RESULTS = ROOT / "abuse" / "results.json"
PAGE = ROOT / "docs" / "reliability.md"
N_FRAMES = 20
MODEL = "anna"
TOO_LATE_MS = 500.0
"""A frame of the bystander's that comes later than this fails a row, whoever is to blame."""
AFTER_S = 1.0
"""How long after a row the bystander is still watched: what was left behind may come out only then."""
BAD_LINES = ("Traceback (most recent", "was never awaited", "never retrieved", "Fatal error", "Task was destroyed")
"""A server that can be left running says none of these, whatever clients do."""

console = Console(highlight=False)


def base_config(models: Path) -> ServerConfig:
    """Timers short enough to be waited for; everything else as it comes."""
    return ServerConfig(
        models=str(models),
        load=(MODEL,),
        handshake_timeout_s=3.0,
        message_timeout_s=4.0,
        idle_timeout_s=6.0,
        keepalive_s=3.0,
        send_timeout_s=4.0,
        grace_s=5.0,
    )


class Shared:
    """The server that most rows are tried on, with its bystander; a new one if a row ended it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._served: Served | None = None
        self._watch: Watch | None = None

    async def get(self) -> tuple[Served, Watch]:
        if self._served is not None and self._served.returncode is not None:
            await self.close()
        if self._served is None or self._watch is None:
            self._served = await self._bench.prepared().start()
            self._watch = await Watch(self._served).__aenter__()
        return self._served, self._watch

    async def close(self) -> None:
        if self._watch is not None:
            await self._watch.__aexit__(None, None, None)
        if self._served is not None:
            await self._served.__aexit__(None, None, None)
        self._served = self._watch = None


async def run_row(row: Row, bench: Bench, shared: Shared) -> Result:
    """Run one, and judge it."""
    found = Findings()
    result = Result(
        row.key,
        row.title,
        row.sent,
        seen=found.seen,
        wrong=found.wrong,
        when=datetime.date.today().isoformat(),
        commit=commit(),
    )
    bench.noticed = result.noticed
    bench.details = result.details
    start = time.monotonic()
    try:
        if row.own:
            async with asyncio.timeout(row.timeout_s):
                await row.run(bench, found)
        else:
            served, watch = await shared.get()
            lines = len(served.output)
            await watch.begin()
            try:
                async with asyncio.timeout(row.timeout_s):
                    await row.run(served, found)
            finally:
                await asyncio.sleep(AFTER_S)
                if served.returncode is None:
                    result.noticed.append(await watch.end())
                else:
                    found.wrong.append(f"the server ended with {served.returncode}: {served.text[-600:]}")
            said = list(served.output)[lines:]
            result.log_lines = len(said)
            judge_log(said, found)
    except NotRun as reason:
        result.verdict, result.wrong = "not run", [str(reason)]
    except TimeoutError as error:
        found.wrong.append(f"not done within {row.timeout_s:g} s" if not str(error) else f"timeout: {error}")
    except Exception as error:  # a row that breaks is a row that failed; the others shall run
        found.wrong.append(f"{type(error).__name__}: {error}")
        console.print_exception()
    result.took_s = time.monotonic() - start
    for noticed in result.noticed:
        judge_noticed(noticed, row, found)
    if result.verdict != "not run" and found.wrong:
        result.verdict = "failed"
    return result


def judge_log(lines: list[str], found: Findings) -> None:
    """No tracebacks."""
    for bad in BAD_LINES:
        if hits := [number for number, line in enumerate(lines) if bad in line]:
            said = "\n".join(line.strip() for line in lines[hits[0] : hits[0] + 40])
            with contextlib.suppress(ValueError):  # JSON has it all in one line
                said = "\n".join(str(value) for value in json.loads(lines[hits[0]]).values())
            words = said[: said.index(bad)][-100:] + " ... " + said.strip()[-300:]
            found.wrong.append(f"{len(hits)} times in the server's log: {bad}: {' / '.join(words.splitlines())}")


def judge_noticed(noticed: Noticed, row: Row, found: Findings) -> None:
    """The bystander's pictures are right and in time, and memory is bounded."""
    seen, memory = noticed.seen, noticed.memory
    if memory.peak - memory.before > row.max_growth_mb:
        found.wrong.append(
            f"memory grew by {memory.peak - memory.before:.0f} MB; at most {row.max_growth_mb:.0f} are taken for right"
        )
    for bad, what in (
        (seen.wrong, f"{seen.wrong} of the bystander's pictures were wrong"),
        (seen.failed, f"{seen.failed} of the bystander's frames failed"),
        (seen.broken, f"the bystander's stream broke: {'; '.join(seen.broken[:3])}"),
        (seen.health_failed, f"health checks failed: {', '.join(seen.health_failed[:5])}"),
        (not seen.frames, "the bystander got no frames"),
    ):
        if bad:
            found.wrong.append(what)
    if not row.disturbs and (worst := max(seen.max_gap_ms, seen.max_ms, seen.health_max_ms)) > TOO_LATE_MS:
        found.wrong.append(f"the bystander waited {worst:.0f} ms: {bystander_text(seen)}")


async def run(keys: list[str], results: dict[str, Result], *, soak_minutes: float, save_to: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lipsync-abuse-") as name:
        folder = Path(name)
        models = folder / "models"
        console.print("making packages")
        make_package(models / MODEL, frames=N_FRAMES, seed=1, crop=168, audio_encoder="loud")
        (folder / "work").mkdir()
        bench = Bench(
            models=models,
            folder=folder / "work",
            model=MODEL,
            n_frames=N_FRAMES,
            base=base_config(models),
            engine=EngineConfig(result_cache_mb=0),
            soak_minutes=soak_minutes,
            progress=lambda text: console.print(f"  {text}", style="dim"),
        )
        shared = Shared(bench)
        try:
            for number, key in enumerate(keys, start=1):
                row = ROWS[key]
                console.print(f"[{number}/{len(keys)}] row {key}: {row.title}", markup=False)
                result = await run_row(row, bench, shared)
                results[key] = result
                save(save_to, results)
                show(result)
        finally:
            await shared.close()


def show(result: Result) -> None:
    """On a terminal."""
    style = {"held": "green", "failed": "red", "not run": "yellow"}[result.verdict]
    console.print(f"  {result.verdict}, {result.took_s:.0f} s", style=style)
    for noticed in result.noticed:
        console.print(f"  memory {memory_text(noticed.memory)} MB; {bystander_text(noticed.seen)}", style="dim")
    for each in result.wrong:
        console.print(f"  - {each}", markup=False, style=style)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description=__doc__)
    parser.add_argument("--rows", default="", help="Rows to run, by name, with commas; all by default.")
    parser.add_argument("--soak-minutes", type=float, default=30.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Where results are kept, as JSON.")
    parser.add_argument("--out", type=Path, default=PAGE, help="The page to write.")
    parser.add_argument("--list", action="store_true", help="Say what rows there are.")
    options = parser.parse_args()
    if options.list:
        for row in ROWS.values():
            console.print(f"{row.key:>10}  {row.title}{' (quick)' if row.short else ''}", markup=False)
        return
    keys = [key.strip() for key in options.rows.split(",") if key.strip()] or list(ROWS)
    if unknown := [key for key in keys if key not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    results = load(options.results) if options.rows else {}
    asyncio.run(run(keys, results, soak_minutes=options.soak_minutes, save_to=options.results))
    ordered = {key: results[key] for key in ROWS if key in results}
    shown = "make test-abuse" if not options.rows else f"make test-abuse ROWS={options.rows}"
    options.out.write_text(page(ordered, shown, PAGE.read_text()))
    failed = [key for key, result in ordered.items() if result.verdict == "failed"]
    console.print(f"wrote {options.out}", markup=False)
    console.print(f"failed: {', '.join(failed)}" if failed else "every row that was run held", markup=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
