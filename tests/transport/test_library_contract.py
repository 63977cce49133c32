"""The private names of grpclib and h2 that the transport leans on. A new version that moves one of them fails here."""

from __future__ import annotations

import inspect

import betterproto.grpc.grpclib_server
import grpclib.client
import grpclib.protocol
import grpclib.server
import pytest
from grpclib.config import Configuration
from h2.connection import H2Connection
from optimized_lipsyncsrv import OptimizedLipSyncServiceBase

from lipsync.transport import client, messages, service


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (grpclib.server.Handler.__init__, ["self", "mapping", "codec", "status_details_codec", "dispatch"]),
        (grpclib.server.Handler.accept, ["self", "stream", "headers", "release_stream"]),
        (grpclib.server.Handler.cancel, ["self", "stream"]),
        (
            grpclib.server.request_handler,
            ["mapping", "_stream", "headers", "codec", "status_details_codec", "dispatch", "release_stream"],
        ),
        (grpclib.protocol.Connection.data_send_process, ["self"]),
        (grpclib.protocol.EventsProcessor.process_request_received, ["self", "event"]),
        (H2Connection._receive_frame, ["self", "frame"]),
        (H2Connection.close_connection, ["self", "error_code", "additional_data", "last_stream_id"]),
        (grpclib.protocol.H2Protocol.__init__, ["self", "handler", "config", "h2_config"]),
        (grpclib.protocol.Connection.create_stream, ["self", "stream_id", "wrapper"]),
        (grpclib.protocol.Stream.recv_data, ["self", "size"]),
        (grpclib.protocol.Stream.send_headers, ["self", "headers", "end_stream"]),
        (grpclib.protocol.EventsProcessor.register, ["self", "stream"]),
        (grpclib.protocol.EventsProcessor.process_stream_reset, ["self", "event"]),
        (grpclib.protocol.EventsProcessor.process_data_received, ["self", "event"]),
        (grpclib.protocol.EventsProcessor.process_remote_settings_changed, ["self", "event"]),
        (grpclib.protocol.EventsProcessor.process_ping_ack_received, ["self", "event"]),
        (grpclib.protocol.EventsProcessor.close, ["self", "reason"]),
        (grpclib.protocol._set_nodelay, ["sock"]),
        (grpclib.client.Channel.__connect__, ["self"]),
        (grpclib.client.Channel._protocol_factory, ["self"]),
        (H2Connection._receive_goaway_frame, ["self", "frame"]),
        (
            betterproto.grpc.grpclib_server.ServiceBase._call_rpc_handler_server_stream,
            ["self", "handler", "stream", "request"],
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: object, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters  # type: ignore[arg-type]


async def test_attributes() -> None:
    server = grpclib.server.Server([])
    for name in ("_mapping", "_codec", "_status_details_codec", "_config", "_h2_config", "__dispatch__"):
        assert hasattr(server, name), name
    channel = grpclib.client.Channel()
    for name in ("_config", "_h2_config", "_connected"):
        assert hasattr(channel, name), name
    assert grpclib.client.Stream._end_done is False
    assert grpclib.client.Stream._send_request_done is False
    assert "_stream" in grpclib.client.Stream.__annotations__
    assert "window_updated.wait()" in inspect.getsource(grpclib.protocol.Stream.send_data)
    assert "_eof" in inspect.getsource(grpclib.protocol.Buffer)
    assert grpclib.client.Handler().connection_lost is False
    assert H2Connection().highest_inbound_stream_id == 0
    assert isinstance(H2Connection.open_inbound_streams, property)
    assert "self.open_inbound_streams" in inspect.getsource(H2Connection._receive_headers_frame)
    assert "ProtocolError" in inspect.getsource(H2Connection.receive_data)
    assert grpclib.utils.Wrapper()._error is None
    handler = grpclib.server.Handler({}, None, None, None)  # type: ignore[arg-type]
    assert handler._tasks == {}
    stream = inspect.signature(grpclib.server.Stream.__init__)
    assert {"stream", "codec", "dispatch"} <= set(stream.parameters)
    for name in ("self._stream = stream", "self._codec = codec"):
        assert name in inspect.getsource(grpclib.server.Stream.__init__)


async def test_the_size_of_a_message_is_asked_for_in_one_piece() -> None:
    """LimitedStream.recv_data sees the size in the prefix because grpclib asks for the whole body at once."""
    asked = []

    class Stream:
        async def recv_data(self, size: int) -> bytes:
            asked.append(size)
            return b"\x00\xff\xff\xff\xff" if size == 5 else b""

    with pytest.raises(AssertionError):
        await grpclib.stream.recv_message(Stream(), None, None)  # type: ignore[arg-type]
    assert asked == [5, 2**32 - 1]


def test_configuration() -> None:
    assert Configuration().__for_server__().http2_stream_window_size == 4 * 2**20
    # a wrong name is refused here; what they do is tested with a cut cable
    Configuration(
        _keepalive_time=1.0,
        _keepalive_timeout=1.0,
        _http2_max_pings_without_data=1,
        _http2_min_sent_ping_interval_without_data=1.0,
        ssl_target_name_override="frames.test",
    )


async def test_what_a_channel_of_a_client_stands_on() -> None:
    channel = grpclib.client.Channel()
    assert channel._protocol is None and "_protocol" not in vars(channel)  # deleting it brings None back
    assert channel._ssl is None
    assert channel._authority == "127.0.0.1:50051"
    assert list(inspect.signature(channel.request).parameters) == [
        *("name", "cardinality", "request_type", "reply_type", "timeout", "deadline", "metadata")
    ]
    # where a status may stand: in the trailers, or in headers that are all there is
    stream = grpclib.protocol.Stream(None, None, None)  # type: ignore[arg-type]
    assert stream.headers is None and stream.trailers is None


def test_routes() -> None:
    routes = OptimizedLipSyncServiceBase().__mapping__()
    assert {service.HEALTH_CHECK, service.STREAM_INFERENCE} <= set(routes)
    source = inspect.getsource(client)
    for route in routes:
        assert f'"{route.removeprefix(messages.SERVICE)}"' in source
    assert len(routes) == 12
