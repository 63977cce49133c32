"""One of three servers killed under load, then another one drained: which calls fail, and what each server saw."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.deploy.fleet import FakeServer, Load, Outcome
from tests.waiting import until

N_CALLS = 60
"""That must succeed before anything happens, and after each thing that does."""
N_HELD = 3
"""Calls that are in flight on the server that is killed, at least."""


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        servers: the killed, the drained, and the one that is left.
        outcomes: of all calls.
        gone_s: when the killed server was no more, by `time.monotonic`.
        exit_code: of the drained server.
    """

    servers: tuple[FakeServer, FakeServer, FakeServer]
    outcomes: list[Outcome]
    gone_s: float
    exit_code: int

    @property
    def failed(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.said != "OK"]

    def was_in_flight(self, call: Outcome) -> bool:
        """Whether it may have been under way on the killed server. It was sent to it, and perhaps never read: then no
        server has seen it."""
        return call.began_s < self.gone_s and not any(call.id in server.began() for server in self.servers[1:])

    def check(self) -> None:
        killed, drained, left = self.servers
        assert [call for call in self.failed if not self.was_in_flight(call)] == []
        held = killed.in_flight()
        assert len(held) >= N_HELD and held <= {call.id for call in self.failed}
        seen = Counter(call_id for server in self.servers for call_id in server.began())
        assert [call_id for call_id, n in seen.items() if n > 1] == [], "calls were made twice"
        assert self.exit_code == 0
        assert drained.in_flight() == left.in_flight() == set()
        for server in self.servers:
            assert set(server.ended().values()) == {"OK"}
            assert set(server.methods()) == {"GenerateInference", "StreamInference"}

    def __str__(self) -> str:
        by_server = [len(server.began()) for server in self.servers]
        return (
            f"{len(self.outcomes)} calls; {by_server[0]} to the server that was killed, {by_server[1]} to the one that "
            f"was drained, {by_server[2]} to the third; {len(self.failed)} failed, in flight on the killed one"
        )


async def killed_and_drained(
    servers: list[FakeServer], load: Load, *, leaving: Callable[[], Awaitable[None]] | None = None
) -> Report:
    """There is load all the while. The first server is killed with calls in flight, then the second is drained;
    `leaving` is called once it has been told so."""
    killed, drained, left = servers
    async with load:
        await until(lambda: load.n_good() >= N_CALLS and all(len(server.ended()) > 5 for server in servers))
        killed.hold()
        await until(lambda: len(killed.in_flight()) >= N_HELD)
        killed.process.kill()
        await asyncio.to_thread(killed.process.wait)
        gone_s = time.monotonic()
        await until(lambda: load.n_good(since_s=gone_s) >= N_CALLS)
        drained.process.send_signal(signal.SIGTERM)
        if leaving is not None:
            await leaving()
        exit_code = await asyncio.to_thread(drained.process.wait)
        left_s = time.monotonic()
        await until(lambda: load.n_good(since_s=left_s) >= N_CALLS)
    return Report((killed, drained, left), load.outcomes, gone_s, exit_code)
