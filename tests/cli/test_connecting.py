"""How commands reach a server: options, variables, and what they become."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from lipsync.cli.connecting import OPTIONS, Connection, connection_options, read_token
from lipsync.cli.settings import OTHER_VARIABLES, load_settings
from lipsync.errors import ConfigError
from lipsync.transport.tls import ClientTLS
from lipsync.transport.tokens import new_token
from tests.commands import typed
from tests.transport.certificates import Certificates
from tests.transport.conftest import serving
from tests.transport.fake_backend import FakeBackend


def said(*arguments: str, **variables: str) -> Connection:
    """What a command is given."""
    given: list[Connection] = []

    @click.command()
    @connection_options
    def command(connection: Connection) -> None:
        given.append(connection)

    result = CliRunner().invoke(command, arguments, env=variables, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return given[0]


def test_options_and_variables_say_the_same() -> None:
    tls = ClientTLS(ca="ca.pem", cert="c.pem", key="k.pem", server_name="frames.test")
    wanted = Connection(token_file=Path("token"), tls=tls, insecure=True)
    files = ("--tls-ca", "ca.pem", "--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-server-name", "frames.test")
    assert said("--token-file", "token", *files, "--insecure") == wanted
    variables = {
        **{"TOKEN_FILE": "token", "TLS_CA": "ca.pem", "TLS_CERT": "c.pem", "TLS_KEY": "k.pem", "INSECURE": "1"},
        "TLS_SERVER_NAME": "frames.test",
    }
    assert said(**{f"LIPSYNC_CLIENT_{name}": value for name, value in variables.items()}) == wanted
    assert said() == said(**{f"LIPSYNC_CLIENT_{name}": "" for name in variables}) == Connection()
    assert said("--tls").tls == said(LIPSYNC_CLIENT_TLS="1").tls == ClientTLS()


def test_the_variables_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's settings may be read in the same environment, and a misspelt variable is an error there."""
    names = {f"LIPSYNC_CLIENT_{name.upper().removeprefix('client_')}" for name in OPTIONS}
    assert names == {name for name in OTHER_VARIABLES if name.startswith("LIPSYNC_CLIENT_")}
    for name in names:
        monkeypatch.setenv(name, "x")
    load_settings(None, {})


@pytest.mark.parametrize("data", [b"", b"\n", b"two words", b"one\ntwo\n", b"x" * 8193])
def test_a_file_that_holds_no_token(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="expected the token alone") as caught:
        read_token(file)
    assert "two" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_token(tmp_path / "none")
    file.write_bytes(b"  secret\r\n")
    assert read_token(file) == "secret"


def test_several_servers() -> None:
    assert Connection().client("a:1, b").address == "a:1, b:50051"
    with pytest.raises(ConfigError, match="address is ''"):
        Connection().client("a,")


@contextmanager
def served(backend: FakeBackend, **settings: Any) -> Iterator[str]:
    """A server in a thread, so that a command can run its own loop here."""
    started: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        try:
            async with serving(backend, **settings) as server:
                started.append("{}:{}".format(*server.address))
                ready.set()
                await asyncio.to_thread(stop.wait)
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        ready.wait()
        yield started[0]
    finally:
        stop.set()
        thread.join()


def test_check_through_tls_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    certificates = Certificates(tmp_path)
    cert, key = certificates.pair("server", "frames.test")
    token, line = new_token("anna", ["infer"])
    for name, text in (("tokens", line), ("token", token)):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(text + "\n")
    how = ("--tls-ca", certificates.ca_file, "--tls-server-name", "frames.test")
    with served(FakeBackend("anna"), tls_cert=cert, tls_key=key, tokens=str(tmp_path / "tokens")) as address:
        done = typed("check", address, *how, "--token-file", "token")
        assert "SERVING, 1 model" in done.stdout and "metadata of anna" in done.stdout
        assert token not in done.stdout + done.stderr
        assert "wants a token" in typed("check", address, *how).stdout
        assert "certificate is not accepted" in typed("check", address, "--tls", "--token-file", "token").stderr
        rendered = ("render", "anna", "speech.wav", "-o", "out.mp4", "--address", "192.0.2.1", "--token-file", "token")
        done = typed(*rendered)
        assert done.returncode == 1 and "in clear text" in done.stderr and token not in done.stderr
