"""Models over a real socket: on demand and by hand, replaced, unloaded; and nothing told of the server's disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lipsync import Client
from lipsync.config import EngineConfig, ServerConfig
from lipsync.engine.engine import Engine
from lipsync.errors import LipsyncError, ModelNotFoundError, PackageError, PermissionDeniedError
from lipsync.transport.server import Server
from tests.packages import make_package

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host") / "models"
    for seed, path in enumerate(("anna", "ben", "team/chi", "a/b/c/d", "a/b/c/e/f", "../outside")):
        make_package(
            folder / path, frames=4, width=192, height=108, crop=168, channels=0.05, seed=seed, with_optional=False
        )
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(models: Path) -> AsyncIterator[Client]:
    config = EngineConfig(device="cpu", runtime="torch-float32", load_on_demand=True, max_models=2, pinned=("anna",))
    async with (
        Engine(config, models=models) as engine,
        Server(engine, ServerConfig(port=0, models=str(models))) as server,
        Client("{}:{}".format(*server.address)) as made,
    ):
        yield made


async def said(client: Client, name: str, path: str) -> str:
    with pytest.raises(LipsyncError) as caught:
        await client.load_package(name, path)
    assert isinstance(caught.value, PermissionDeniedError)
    return str(caught.value)


async def test_whatever_is_refused_or_missing_looks_the_same(client: Client, models: Path) -> None:
    (models / "out").symlink_to(models.parent / "outside")
    (models / "deep").symlink_to("/etc")
    (models / "file").touch()
    os.mkfifo(models / "fifo")
    (models / "loop").symlink_to("loop")
    paths = ["out", "deep", "deep/ssl", "file", "file/x", "fifo", "loop", "gone", "anna/gone", "..", ".", "/", "/etc"]
    paths += ["../outside", str(models.parent / "outside"), str(models), "a\0b", "x" * 65, "an na", "a/b/c/e/f"]
    texts = {await said(client, "new", path) for path in paths}
    assert len(texts) == 1
    (text,) = texts
    assert "models" in text and str(models.parent) not in text
    for name in ("out", "gone", "file"):  # the package of the model's own name
        assert await said(client, name, "") == text


async def test_what_lies_below_loads_and_what_is_wrong_with_it_is_told(client: Client, models: Path) -> None:
    for name, path in (("chi", "team/chi"), ("deep", "a/b/c/d"), ("ben", str(models / "ben"))):
        assert (await client.load_package(name, path)).frame_count == 4
    (models / "empty").mkdir()
    (models / "broken").mkdir()
    (models / "broken/full_body.mp4").symlink_to("/etc/passwd")
    for name, told in (("empty", "the folder is empty"), ("broken", "a link that leaves the package's folder")):
        with pytest.raises(PackageError) as caught:
            await client.load_package(name)
        assert told in str(caught.value) and str(models.parent) not in str(caught.value)


async def test_models_come_and_go(client: Client) -> None:
    assert (await client.frame("anna", 0)).ok
    assert (await client.frame("ben", 0)).ok
    assert await client.models() == ["anna", "ben"]
    metadata = await client.model("anna")
    assert metadata.pinned and not (await client.model("ben")).pinned
    with pytest.raises(ModelNotFoundError):
        await client.frame("gone", 0)
    with pytest.raises(ModelNotFoundError):
        await client.frame("outside", 0)
    await client.unload_package("ben")
    assert await client.models() == ["anna"]
    frames = await client.frames("ben", [0, 1])
    assert all(frame.ok for frame in frames)


async def test_a_package_that_is_replaced_serves_on(client: Client, models: Path) -> None:
    first, old = await client.model("anna"), (await client.frame("anna", 2)).jpeg
    assert (await client.load_package("anna")).load_ms == 0
    new = models / "anna.new"
    shutil.copytree(models / "ben", new)
    (models / "anna").rename(models / "anna.old")
    new.rename(models / "anna")
    assert (await client.load_package("anna")).load_ms > 0
    second = await client.model("anna")
    assert second.version != first.version and (await client.frame("anna", 2)).jpeg != old
    (models / "anna/aud_ave.npy").unlink()
    with pytest.raises(PackageError, match="audio: missing"):
        await client.load_package("anna")
    assert (await client.model("anna")).version == second.version and (await client.frame("anna", 3)).ok
