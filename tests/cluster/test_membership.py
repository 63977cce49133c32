"""Replicas' ids from whichever thread they come in."""

from __future__ import annotations

from lipsync.cluster import membership

APP = "of-this-test"


def test_whoever_watches_is_told_what_is_known_and_what_changes() -> None:
    told: list[frozenset[str]] = []
    membership.tell(APP, frozenset({"a"}))
    membership.watch(APP, told.append)
    membership.tell(APP, frozenset({"a"}))
    membership.tell(APP, frozenset({"a", "b"}))
    membership.tell("another", frozenset({"c"}))
    assert told == [{"a"}, {"a", "b"}]
    membership.unwatch(APP)
    membership.unwatch("another")
    membership.tell(APP, frozenset())
    assert told == [{"a"}, {"a", "b"}]
    membership.unwatch(APP)
    membership.watch(APP, told.append)
    assert len(told) == 2, "what was known is forgotten with whoever watched"
    membership.unwatch(APP)
