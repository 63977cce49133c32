"""The servers that a client may call: one connection to each, taken in turn.

A server that cannot be connected, or whose connection broke, is left out for a while; calls go to the others meanwhile,
and none of them waits for it. Only while nobody is connected do calls wait, and then for whoever is first.
"""

from __future__ import annotations

import asyncio
import errno
import math
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import random

from grpclib.exceptions import StreamTerminatedError

from lipsync.transport.address import format_address, ip_of, is_loopback, parse_address
from lipsync.transport.protocol import GrpcChannel

DNS = "dns:///"
RECONNECT_S = 0.5
"""How long a server is left out after its first failure in a row; twice as long after the next, and so on."""
MOST_RECONNECT_S = 30.0
RESOLVE_SOON_S = 1.0
"""Names are not asked for more often than this, whatever fails."""
SETTLE_S = 0.05
"""What the other servers are given once the first is connected, so that what begins together is spread."""


CLOSE_S = 0.5
"""How long servers may take to answer TLS's goodbye."""


class NotConnectedError(Exception):
    """No server could be connected, so that nothing was sent. `reason` is why, for the one tried last."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Target:
    """An address as it was given.

    Attributes:
        every_address: True if each address of its name is a server, though all of them be this machine's.
    """

    host: str
    port: int
    every_address: bool = False

    @classmethod
    def parse(cls, address: str) -> Target:
        """Of "host:port", "host", "[::1]:50051" or "dns:///name:port". Raises ConfigError."""
        return cls(*parse_address(address.removeprefix(DNS)), every_address=address.startswith(DNS))

    def __str__(self) -> str:
        return format_address(self.host, self.port)

    @property
    def is_name(self) -> bool:
        return ip_of(self.host) is None

    @property
    def is_loopback(self) -> bool:
        """True if what is sent there stays on this machine."""
        return self.host.lower() == "localhost" or is_loopback(self.host)


Place = tuple[str, int]
"""A host, mostly an address in numbers, and a port."""


class Endpoint:
    """One server: its connection, and how well that went of late."""

    def __init__(self, channel: GrpcChannel, *, jitter: Callable[[], float]) -> None:
        self.channel = channel
        self.connecting: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        self.retry_at_s = 0.0
        self._jitter = jitter
        self._n_failures = 0
        self._connected = False

    @property
    def ready(self) -> bool:
        return self.channel.ready

    def connected(self) -> None:
        self._connected = True
        self.error = None

    def lost(self) -> bool:
        """True, once, if the connection broke since `connected`."""
        lost = self._connected and not self.channel.ready
        if lost:
            self._connected = False
        return lost and not self.channel.went_away

    def failed(self, now_s: float) -> None:
        """It is left out from now on, for longer each time: at least half of a time that doubles."""
        most_s = min(MOST_RECONNECT_S, RECONNECT_S * 2.0 ** min(self._n_failures, 32))
        self._n_failures += 1
        self.retry_at_s = now_s + most_s * (1 + self._jitter()) / 2

    def answered(self) -> None:
        """Nothing is wrong with it."""
        self._n_failures = 0


class Channels:
    """Takes one server after the other, of those that are connected. Belongs to the event loop that first uses it.

    Attributes:
        closed: True once `close` was called.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        open_channel: Callable[[Place, Target], GrpcChannel],
        *,
        connect_timeout_s: float,
        resolve_s: float,
        jitter: Callable[[], float] = random,
    ) -> None:
        """
        Args:
            open_channel: makes a channel, without connecting it.
            connect_timeout_s: for making a connection, until the server has greeted; and for resolving a name.
            resolve_s: how old a name's addresses may get while calls are made.
            jitter: numbers from 0 to 1.
        """
        self._targets = tuple(dict.fromkeys(targets))
        self._open_channel = open_channel
        self._connect_timeout_s = connect_timeout_s
        self._resolve_s = resolve_s
        self._jitter = jitter
        self._places: dict[Target, list[Place]] = {}
        self._endpoints: dict[Place, Endpoint] = {}
        self._retired: set[GrpcChannel] = set()
        self._resolving: asyncio.Task[None] | None = None
        self._resolve_error: Exception | None = None
        self._news = asyncio.Event()  # servers are known, or no more will be
        self._resolved_at_s = -math.inf
        self._resolve_at_s = -math.inf
        self._turn = int(jitter() * 1000)  # so that not every client begins with the same server
        self.closed = False

    @property
    def endpoints(self) -> list[Endpoint]:
        """Those that are known by now."""
        return list(self._endpoints.values())

    async def take(self, *, avoid: Endpoint | None = None) -> Endpoint:
        """A server that is connected; another one than `avoid` if there is one. Raises NotConnectedError."""
        await self._resolved()
        now_s = _now_s()
        for endpoint in self._endpoints.values():
            if endpoint.lost():
                self._failed(endpoint)
            if now_s >= endpoint.retry_at_s:
                self._connect(endpoint)
        return self._next(avoid) or await self._first(avoid)

    async def close(self) -> None:
        """Hang up: every connection, those with calls in flight included."""
        self.closed = True
        tasks = [endpoint.connecting for endpoint in self._endpoints.values()] + [self._resolving]
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        all_channels = [*(endpoint.channel for endpoint in self._endpoints.values()), *self._retired]
        for channel in all_channels:
            channel.close()
        await asyncio.gather(*(channel.wait_closed(CLOSE_S) for channel in all_channels))
        await asyncio.sleep(0)  # what was aborted closes its socket in the loop's next round

    def _next(self, avoid: Endpoint | None) -> Endpoint | None:
        ready = [endpoint for endpoint in self._endpoints.values() if endpoint.ready]
        others = [endpoint for endpoint in ready if endpoint is not avoid] or ready
        if not others:
            return None
        self._turn += 1
        return others[self._turn % len(others)]

    async def _first(self, avoid: Endpoint | None) -> Endpoint:
        """Whoever can be connected first. All are tried: one that was left out is better than none."""
        tried: set[Endpoint] = set()
        while True:
            if self.closed:
                raise NotConnectedError(StreamTerminatedError("the client was closed"))
            for endpoint in self._endpoints.values():
                if endpoint not in tried:
                    tried.add(endpoint)
                    self._connect(endpoint)
            waiting = {each.connecting for each in self._endpoints.values() if each.connecting is not None}
            if any(endpoint.ready for endpoint in self._endpoints.values()):
                if waiting:
                    await asyncio.wait(waiting, timeout=SETTLE_S)
                if (found := self._next(avoid)) is not None:
                    return found
                continue  # lost again meanwhile
            if not waiting:
                # the name may stand for others by now
                self._refresh()
                if self._resolving is not None:
                    waiting = {self._resolving}
                elif tried.issuperset(self._endpoints.values()):
                    raise NotConnectedError(self._why_none())
                else:
                    continue
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    def _why_none(self) -> Exception:
        errors = [endpoint.error for endpoint in self._endpoints.values() if endpoint.error is not None]
        return errors[-1] if errors else StreamTerminatedError("the connection was lost as soon as it was made")

    # Connections

    def _connect(self, endpoint: Endpoint) -> None:
        if endpoint.connecting is None and not endpoint.ready:
            endpoint.connecting = asyncio.create_task(self._connecting(endpoint), name="lipsync-connect")

    async def _connecting(self, endpoint: Endpoint) -> None:
        """Shared by all calls that wait for this server; tells how it went in the endpoint."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await endpoint.channel.__connect__()
        except Exception as error:
            endpoint.error = error
            if isinstance(error, TimeoutError) and error.errno is None:
                endpoint.error = _too_late(self._connect_timeout_s)
            endpoint.channel.hang_up()
            self._failed(endpoint)
        else:
            endpoint.connected()
        finally:
            endpoint.connecting = None

    def _failed(self, endpoint: Endpoint) -> None:
        endpoint.failed(_now_s())
        self._resolve_at_s = min(self._resolve_at_s, self._resolved_at_s + RESOLVE_SOON_S)

    # Names

    async def _resolved(self) -> None:
        """Wait until there are servers; that what is known gets too old is nothing to wait for."""
        self._refresh(now=not self._endpoints)
        while not self._endpoints and self._resolving is not None:
            self._news.clear()
            await self._news.wait()
        if not self._endpoints:
            raise NotConnectedError(self._resolve_error or StreamTerminatedError("the client was closed"))

    def _refresh(self, *, now: bool = False) -> None:
        due = now or _now_s() >= self._resolve_at_s
        if due and self._resolving is None and not self.closed:
            self._resolving = asyncio.create_task(self._resolve(), name="lipsync-resolve")

    async def _resolve(self) -> None:
        """Ask for all names at once. One that cannot be had now keeps the addresses that it had."""
        names = any(target.is_name for target in self._targets)
        self._resolved_at_s = _now_s()
        self._resolve_at_s = self._resolved_at_s + self._resolve_s if names else math.inf
        try:
            await asyncio.gather(*map(self._resolve_one, self._targets))
        finally:
            self._resolving = None
            self._news.set()

    async def _resolve_one(self, target: Target) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                self._places[target] = await _places_of(target)
        except OSError as error:
            late = isinstance(error, TimeoutError) and error.errno is None
            self._resolve_error = _too_late(self._connect_timeout_s) if late else error
            self._resolve_at_s = min(self._resolve_at_s, self._resolved_at_s + RESOLVE_SOON_S)
        else:
            self._meet()
            self._news.set()

    def _meet(self) -> None:
        """Know the servers that are there now, and no others; calls in flight elsewhere finish."""
        wanted = {place: target for target in self._targets for place in self._places.get(target, ())}
        for place in self._endpoints.keys() - wanted.keys():
            gone = self._endpoints.pop(place)
            if gone.connecting is not None:
                gone.connecting.cancel()
            gone.channel.retire()
            self._retired.add(gone.channel)
        self._retired = {channel for channel in self._retired if channel.open}
        for place, target in wanted.items():
            if place not in self._endpoints:
                self._endpoints[place] = Endpoint(self._open_channel(place, target), jitter=self._jitter)


async def _places_of(target: Target) -> list[Place]:
    """The servers that an address stands for. Raises OSError."""
    if not target.is_name:
        return [(target.host, target.port)]
    loop = asyncio.get_running_loop()
    # names with dots at odd places raise UnicodeError, which would be no one's
    try:
        infos = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "this is no name of a server") from error
    hosts = dict.fromkeys(_host(info[4]) for info in infos)
    if not target.every_address and all(map(is_loopback, hosts)):
        return [(target.host, target.port)]
    return [(host, target.port) for host in hosts]


def _host(address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> str:
    """Of a socket address; with its zone, where there is one."""
    host = str(address[0])
    return f"{host}%{address[3]}" if len(address) == 4 and address[3] and "%" not in host else host


def _too_late(limit_s: float) -> OSError:
    return OSError(errno.ETIMEDOUT, f"no answer within {limit_s:g} s")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
