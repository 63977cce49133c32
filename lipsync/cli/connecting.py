"""How commands reach a server: the options of whatever is a client, and the client that they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lipsync.errors import ConfigError
from lipsync.transport.client import Client
from lipsync.transport.tls import ClientTLS

MAX_TOKEN_BYTES = 8192
_FILE = click.Path(dir_okay=False)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What the options say.

    Attributes:
        token_file: the file that holds the token; the token itself is on no command line, where others could see it.
        tls: what the server must show, and what is shown to it; None for clear text.
        insecure: True if the token may go over a network in clear text.
    """

    token_file: Path | None = None
    tls: ClientTLS | None = None
    insecure: bool = False

    def client(self, address: str, **options: Any) -> Client:
        """A client of one server, or of several with commas between them. Raises ConfigError."""
        addresses = [part.strip() for part in address.split(",")]
        token = None if self.token_file is None else read_token(self.token_file)
        return Client(addresses, tls=self.tls, token=token, insecure=self.insecure, **options)


def read_token(path: Path) -> str:
    """The one line of a file. Raises ConfigError, which does not say what is in it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror}") from error
    lines = data.decode("ascii", errors="replace").split()
    if len(data) > MAX_TOKEN_BYTES or len(lines) != 1:
        raise ConfigError(f"token file {path} holds something else than one token; expected the token alone")
    return lines[0]


OPTIONS = {
    "token_file": click.option(
        "--token-file", type=_FILE, envvar="LIPSYNC_CLIENT_TOKEN_FILE", help="File with the token that the server asks."
    ),
    "tls": click.option(
        "--tls", is_flag=True, envvar="LIPSYNC_CLIENT_TLS", help="Use TLS; the other --tls options say so too."
    ),
    "tls_ca": click.option(
        "--tls-ca",
        type=_FILE,
        envvar="LIPSYNC_CLIENT_TLS_CA",
        help="CAs, PEM, that may vouch for the server; the system's by default.",
    ),
    "tls_cert": click.option(
        "--tls-cert", type=_FILE, envvar="LIPSYNC_CLIENT_TLS_CERT", help="The certificate to show the server, PEM."
    ),
    "tls_key": click.option(
        "--tls-key", type=_FILE, envvar="LIPSYNC_CLIENT_TLS_KEY", help="The certificate's private key, PEM."
    ),
    "tls_server_name": click.option(
        "--tls-server-name",
        metavar="NAME",
        envvar="LIPSYNC_CLIENT_TLS_SERVER_NAME",
        help="The name in the server's certificate; that of its address by default.",
    ),
    "insecure": click.option(
        "--insecure",
        is_flag=True,
        envvar="LIPSYNC_CLIENT_INSECURE",
        help="Send the token to another machine in clear text all the same.",
    ),
}


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options; it is called with what they say, as `connection`."""

    @functools.wraps(command)
    def connecting(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in OPTIONS}
        names = ("tls_ca", "tls_cert", "tls_key", "tls_server_name")
        # an empty variable is none
        tls = {name.removeprefix("tls_"): given[name] or None for name in names}
        connection = Connection(
            token_file=Path(given["token_file"]) if given["token_file"] else None,
            tls=ClientTLS(**tls) if given["tls"] or any(tls.values()) else None,
            insecure=given["insecure"],
        )
        return command(*args, connection=connection, **options)

    for option in reversed(OPTIONS.values()):
        connecting = option(connecting)
    return connecting
