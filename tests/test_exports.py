from __future__ import annotations

import lipsync
import lipsync.config
import lipsync.errors
import lipsync.types


def test_exports_are_sorted_and_there() -> None:
    assert lipsync.__all__ == sorted(lipsync.__all__)
    assert len(set(lipsync.__all__)) == len(lipsync.__all__)
    assert set(lipsync.__all__) <= set(dir(lipsync))


def test_every_error_is_exported() -> None:
    assert set(lipsync.errors.__all__) <= set(lipsync.__all__)
    for name in lipsync.errors.__all__:
        assert getattr(lipsync, name) is getattr(lipsync.errors, name)


def test_what_a_server_takes_is_exported() -> None:
    assert lipsync.ServerConfig is lipsync.config.ServerConfig
    assert lipsync.EngineConfig is lipsync.config.EngineConfig
    assert lipsync.serve.__module__ == lipsync.Server.__module__ == "lipsync.transport.server"


def test_the_version_is_a_text() -> None:
    assert lipsync.__version__[0].isdigit()
