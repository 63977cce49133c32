"""Models that follow in all workers, whatever the order in which what is said arrives."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.cli import worker_models
from lipsync.cli.worker_channel import MAX_LINE_BYTES
from lipsync.cli.worker_models import MAX_ERROR, MAX_REMEMBERED, Change, ModelChanges, SharedModels
from lipsync.errors import DeviceError, EngineClosedError, LipsyncError, ModelExistsError, ModelNotFoundError
from lipsync.types import ModelInfo
from tests.waiting import until

ANNA = Change("anna", "/models/anna", "/models")
NO_ANNA = Change("anna")


class FakeModels:
    """What is loaded, by name. Loading what `broken` names fails."""

    def __init__(self, **loaded: str) -> None:
        self.loaded = loaded
        self.broken: set[str] = set()

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        await asyncio.sleep(0)
        if name in self.broken:
            raise DeviceError("no memory")
        if self.loaded.get(name, path) != path:
            raise ModelExistsError(name)
        self.loaded[name] = path
        return ModelInfo(name, path, 1, "none", (), (), False, 0.0)

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)
        if name not in self.loaded:
            raise ModelNotFoundError(name)
        del self.loaded[name]

    @property
    def ready(self) -> bool:
        return True


class Recorded:
    def __init__(self) -> None:
        self.sent: deque[dict[str, Any]] = deque()

    def send(self, kind: str, **fields: object) -> None:
        self.sent.append({"kind": kind, **fields})


# The parent


def test_a_change_is_settled_once_all_that_serve_have_made_it() -> None:
    changes = ModelChanges()
    number = changes.asked(0, 7, ANNA, {0, 1, 2})
    assert changes.made(0, number, had=False) is None
    assert changes.made(0, number, had=False) is None, "twice by one is once"
    assert changes.made(3, number, had=True) is None, "it is not waited for"
    assert changes.made(1, number, had=True) is None
    settled = changes.made(2, number, had=False, error="no memory")
    assert settled is not None and (settled.worker, settled.ask) == (0, 7)
    assert settled.had and settled.errors == {2: "no memory"}
    assert changes.made(2, number, had=False) is None


def test_what_went_wrong_in_all_of_many_workers_can_be_told() -> None:
    """A message that is too long would end the worker that asked."""
    changes = ModelChanges()
    number = changes.asked(0, 7, ANNA, range(256))
    for worker in range(256):
        settled = changes.made(worker, number, had=False, error="\N{FACE WITH OPEN MOUTH}" * MAX_ERROR)
    assert settled is not None and len(settled.errors) == 256
    assert len(json.dumps({"kind": "settled", **settled._asdict()})) < MAX_LINE_BYTES


def test_one_that_is_gone_is_not_waited_for() -> None:
    changes = ModelChanges()
    number = changes.asked(0, 7, ANNA, {0, 1})
    changes.made(0, number, had=False)
    assert [settled.ask for settled in changes.gone(1)] == [7]


def test_the_next_of_its_number_gets_no_answers_to_what_it_did_not_ask() -> None:
    changes = ModelChanges()
    number = changes.asked(0, 1, ANNA, {0, 1})
    assert changes.gone(0) == []
    assert changes.made(1, number, had=False) is None


def test_the_last_changes_are_remembered_and_no_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_models, "MAX_REMEMBERED", 3)
    changes = ModelChanges()
    for change in (ANNA, Change("b"), Change("c"), NO_ANNA, Change("d")):
        changes.asked(0, 1, change, set())
    assert changes.so_far() == (Change("c"), NO_ANNA, Change("d"))
    assert MAX_REMEMBERED > 1000


# A worker


async def test_it_is_done_here_then_told_then_answered() -> None:
    backend, parent = FakeModels(), Recorded()
    models = SharedModels(backend, parent)
    assert models.ready, "all else goes to the backend"
    call = asyncio.create_task(models.load(ANNA.path, name="anna", below=ANNA.below))
    await until(lambda: bool(parent.sent) or call.done())
    assert backend.loaded == {"anna": ANNA.path} and not call.done()
    assert parent.sent.popleft() == {"kind": "ask", "ask": 1, "change": ANNA}
    models.settled({"ask": 99, "had": False, "errors": {}})
    models.settled({"ask": 1, "had": False, "errors": {}})
    assert (await call).name == "anna"


async def test_what_others_could_not_is_told() -> None:
    backend, parent = FakeModels(), Recorded()
    models = SharedModels(backend, parent)
    call = asyncio.create_task(models.load(ANNA.path, name="anna"))
    await until(lambda: bool(parent.sent) or call.done())
    models.settled({"ask": 1, "had": False, "errors": {"2": "no memory"}})
    with pytest.raises(DeviceError, match="worker 2: no memory"):
        await call


@pytest.mark.parametrize("others_had", [True, False])
async def test_others_may_have_what_is_not_here(others_had: bool) -> None:
    models = SharedModels(FakeModels(), parent := Recorded())
    call = asyncio.create_task(models.unload("anna"))
    await until(lambda: bool(parent.sent) or call.done())
    models.settled({"ask": 1, "had": others_had, "errors": {}})
    if others_had:
        await call
    else:
        with pytest.raises(ModelNotFoundError):
            await call


async def test_what_no_model_is_called_is_not_passed_on() -> None:
    models = SharedModels(FakeModels(), parent := Recorded())
    with pytest.raises(ModelNotFoundError):
        await models.unload("no model's name")
    assert not parent.sent


async def test_without_a_parent_nobody_waits() -> None:
    models = SharedModels(FakeModels(), parent := Recorded())
    call = asyncio.create_task(models.load(ANNA.path, name="anna"))
    await until(lambda: bool(parent.sent) or call.done())
    models.abandoned()
    with pytest.raises(EngineClosedError):
        await call
    with pytest.raises(EngineClosedError):
        await models.unload("anna")


async def test_changes_are_made_whatever_is_there() -> None:
    backend, parent = FakeModels(anna="/models/other"), Recorded()
    models = SharedModels(backend, parent)
    await models.make(1, ANNA)
    assert backend.loaded == {"anna": ANNA.path}
    for number, had in ((2, True), (3, False)):
        await models.make(number, NO_ANNA)
        assert parent.sent[-1] == {"kind": "made", "number": number, "had": had, "error": ""}
    backend.broken.add("anna")
    await models.make(4, ANNA)
    assert parent.sent[-1]["error"] == "no memory"


async def test_one_that_starts_again_loads_what_it_can() -> None:
    backend = FakeModels()
    backend.broken.add("ben")
    await SharedModels(backend, Recorded()).catch_up([Change("ben", "/b"), NO_ANNA, Change("chi", "/c")])
    assert backend.loaded == {"chi": "/c"}


# All together


class Cluster:
    """Workers and their parent; what they say waits until it is delivered."""

    def __init__(self, n_workers: int) -> None:
        self.changes = ModelChanges()
        self.backends = [FakeModels() for _ in range(n_workers)]
        self.up = [Recorded() for _ in range(n_workers)]
        self.down: list[deque[tuple[int, Change]]] = [deque() for _ in range(n_workers)]
        self.models = [SharedModels(*each) for each in zip(self.backends, self.up, strict=True)]
        self.calls: list[asyncio.Task[Any]] = []

    async def settle_down(self) -> None:
        """Until everything that runs waits for what is to be delivered."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def ask(self, worker: int, change: Change) -> None:
        models = self.models[worker]
        if change.path:
            self.calls.append(asyncio.create_task(models.load(change.path, name=change.name)))
        else:
            self.calls.append(asyncio.create_task(models.unload(change.name)))
        await self.settle_down()

    async def deliver_up(self, worker: int) -> None:
        if not self.up[worker].sent:
            return
        message = self.up[worker].sent.popleft()
        if message["kind"] == "ask":
            serving = range(len(self.models))
            number = self.changes.asked(worker, message["ask"], message["change"], serving)
            for queue in self.down:
                queue.append((number, message["change"]))
            return
        del message["kind"]
        self._tell([self.changes.made(worker, message.pop("number"), **message)])
        await self.settle_down()

    def _tell(self, all_settled: list[Any]) -> None:
        for settled in all_settled:
            if settled is not None:
                self.models[settled.worker].settled(settled._asdict())

    async def deliver_down(self, worker: int) -> None:
        if self.down[worker]:
            await self.models[worker].make(*self.down[worker].popleft())

    async def fall(self, worker: int) -> None:
        """And start again."""
        self.models[worker].abandoned()
        self._tell(self.changes.gone(worker))
        self.backends[worker], self.up[worker] = FakeModels(), Recorded()
        self.models[worker] = SharedModels(self.backends[worker], self.up[worker])
        self.down[worker].clear()
        await self.models[worker].catch_up(self.changes.so_far())

    async def deliver_all(self) -> None:
        while any(self.down) or any(up.sent for up in self.up):
            for worker in range(len(self.models)):
                await self.deliver_up(worker)
                await self.deliver_down(worker)


CHANGES = st.builds(Change, st.sampled_from(["anna", "ben"]), st.sampled_from(["", "/one", "/two"]))
WORKER = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.just("ask"), WORKER, CHANGES),
    st.tuples(st.sampled_from(["deliver_up", "deliver_down", "fall"]), WORKER),
)


@given(st.lists(STEPS, max_size=40))
def test_all_end_with_the_same_models_and_every_caller_is_answered(steps: list[tuple[Any, ...]]) -> None:
    async def play() -> None:
        cluster = Cluster(3)
        for name, *arguments in steps:
            await getattr(cluster, name)(*arguments)
        await cluster.deliver_all()
        wanted = {change.name: change.path for change in cluster.changes.so_far() if change.path}
        assert [backend.loaded for backend in cluster.backends] == [wanted] * 3
        answers = await asyncio.gather(*cluster.calls, return_exceptions=True)
        assert all(isinstance(answer, ModelInfo | LipsyncError | None) for answer in answers)

    asyncio.run(asyncio.wait_for(play(), 60))
