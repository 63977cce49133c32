"""`lipsync render`: a package and a recording into a video, here and through a server."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lipsync.cli.commands import cli
from lipsync.cli.render import check_target, model_name, render_video
from lipsync.cli.stopping import Termination
from lipsync.config import EngineConfig
from lipsync.engine.audio import read_audio
from lipsync.engine.engine import Engine
from lipsync.errors import InternalError, LipsyncError, MediaError
from lipsync.types import Frame, SpeechEvent, SpeechEventKind, SpeechOptions
from tests.engine.test_sound import write_recording
from tests.packages import make_package
from tests.serving import ServerProcess

TIMEOUT_S = 120
FRAME_S = 1 / 25


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The process's own is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_package(folder / "anna", frames=12, seed=1, audio_encoder=True)
    make_package(folder / "ben", frames=4, seed=2)
    (folder / "broken").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--models", str(models), "--load", "anna", "--port", "0") as server:
        yield server


def render(*arguments: str | Path) -> str:
    """What the command prints. Raises what it raises."""
    termination = Termination()
    termination.remember()
    done = CliRunner().invoke(
        cli, ["render", *map(str, arguments)], obj=termination, standalone_mode=False, catch_exceptions=False
    )
    return done.output


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("recordings") / "speech.wav", "pcm_s16le", 44_100, "stereo", 1.03)


SESSION = SpeechOptions(start_frame=5, rest_after_s=None, jpeg_quality=95)


@pytest.fixture(scope="module")
def session_pictures(models: Path, recording: Path) -> list[np.ndarray]:
    """What a session of these options shows for the recording."""
    return asyncio.run(_session_pictures(models / "anna", recording))


async def _session_pictures(package: Path, recording: Path) -> list[np.ndarray]:
    async with Engine(EngineConfig()) as engine:
        await engine.load(package)
        async with await engine.speech("anna", SESSION) as session:
            await session.send(read_audio(recording).tobytes())
            await session.end()
            events = [event async for event in session]
    frames = [event.frame for event in events if event.kind is SpeechEventKind.FRAME]
    return [np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB")) for frame in frames if frame is not None]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def check_streams(path: Path, *, n_frames: int, rate_hz: int, n_channels: int) -> None:
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (video.width, video.height, video.average_rate, video.frames) == (640, 360, 25, n_frames)
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", rate_hz, n_channels)
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < FRAME_S
        n_samples = sum(frame.samples for frame in container.decode(audio=0))
        assert 0 <= n_samples / rate_hz - n_frames * FRAME_S < FRAME_S
    written = path.read_bytes()
    assert written.find(b"moov") < written.find(b"mdat")


@pytest.mark.parametrize("remote", [False, True])
def test_frames_are_those_of_a_session(
    models: Path,
    server: ServerProcess,
    recording: Path,
    session_pictures: list[np.ndarray],
    tmp_path: Path,
    remote: bool,
) -> None:
    target = tmp_path / "out.mp4"
    target.write_text("the one before")
    where = ("anna", "--address", server.address) if remote else (models / "anna",)
    said = render(*where, recording, "-o", target, "--start-frame", "5", "--never-rest", "--quality", "5")
    assert said.startswith(f"wrote {target}: 1.04 s, 26 frames, made at ") and said.endswith(" kB\n")
    check_streams(target, n_frames=26, rate_hz=44_100, n_channels=2)
    for expected, picture in zip(session_pictures, pictures(target), strict=True):
        assert psnr(expected, picture) > 35
    assert psnr(session_pictures[0], session_pictures[5]) < 30  # or the comparison would say nothing
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout", "written_hz", "n_channels"),
    [
        ("speech.mp3", "libmp3lame", 44_100, "stereo", 44_100, 2),
        ("speech.m4a", "aac", 48_000, "mono", 48_000, 1),
        ("speech.wav", "pcm_s16le", 8_000, "mono", 32_000, 1),
    ],
)
def test_any_recording(
    server: ServerProcess,
    tmp_path: Path,
    name: str,
    codec: str,
    rate_hz: int,
    layout: str,
    written_hz: int,
    n_channels: int,
) -> None:
    recording = write_recording(tmp_path / name, codec, rate_hz, layout, 0.5)
    n_frames = -(-len(read_audio(recording)) // 640)
    render("anna", recording, "--address", server.address, "-o", tmp_path / "OUT.MP4")
    check_streams(tmp_path / "OUT.MP4", n_frames=n_frames, rate_hz=written_hz, n_channels=n_channels)


def test_options_reach_the_session(models: Path, server: ServerProcess, tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "speech.wav", "pcm_s16le", 16_000, "mono", 0.4)
    where = ("anna", recording, "--address", server.address)
    render(*where, "--rest-after", "0", "--quiet", "0", "-o", tmp_path / "rest.mp4")
    render(*where, "--never-rest", "-o", tmp_path / "moves.mp4")
    with av.open(str(models / "anna" / "full_body.mp4")) as container:
        own = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for resting, moving, picture in zip(
        pictures(tmp_path / "rest.mp4"), pictures(tmp_path / "moves.mp4"), own, strict=False
    ):
        assert psnr(resting, picture) > psnr(moving, picture) + 3
    with pytest.raises(LipsyncError, match="rest_after_s is -1.0; expected 0 to 3600"):
        render(*where, "--rest-after", "-1", "-o", tmp_path / "out.mp4")
    with pytest.raises(LipsyncError, match="blend is 'soft'"):
        render(models / "anna", recording, "--blend", "soft", "-o", tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{models}/broken", "{audio}"), "the folder is empty"),
        (("{models}/nobody", "{audio}"), "nobody cannot be used"),
        (("{models}/ben", "{audio}"), "'ben' has no audio encoder; put audio_encoder.safetensors into its package"),
        (("zoe", "{audio}", "--address", "{server}"), "'zoe' is not loaded"),
        (("anna", "{audio}", "--address", "127.0.0.1:1"), "check that the server runs there"),
        (("{models}/anna", "{models}/anna/full_body.mp4"), "full_body.mp4: no audio track in it"),
        (("{models}/anna", "{models}/anna/crop_rectangles.json"), "cannot be read as audio"),
        (("{models}/anna", "{models}/none.wav"), "none.wav: cannot be read as audio"),
        (("{models}/anna", "{audio}", "-o", "out.mov"), "out.mov: only MP4 is written"),
        (("{models}/anna", "{audio}", "-o", "/nowhere/out.mp4"), "there is no folder /nowhere; make it first"),
        (("{models}/anna", "{audio}", "-o", "/proc/out.mp4"), "folder /proc cannot be written"),
    ],
)
def test_what_is_wrong_is_told(
    models: Path, server: ServerProcess, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    recording = write_recording(tmp_path / "speech.wav", "pcm_s16le", 16_000, "mono", 0.4)
    (tmp_path / "out.mp4").write_text("the one before")
    known = {"models": models, "audio": recording, "server": server.address}
    given = [argument.format(**known) for argument in arguments]
    with pytest.raises(LipsyncError) as caught:
        render(*given, *([] if "-o" in given else ["-o", tmp_path / "out.mp4"]))
    assert message in str(caught.value)
    assert (tmp_path / "out.mp4").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 2


def test_targets(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="this is a folder"):
        check_target(tmp_path / "folder.mp4", tmp_path / "speech.wav")
    (tmp_path / "speech.mp4").touch()
    with pytest.raises(MediaError, match="the recording itself"):
        check_target(tmp_path / "speech.mp4", tmp_path / "folder.mp4" / ".." / "speech.mp4")
    assert model_name(tmp_path / "Anna B") == "Anna_B" and model_name(Path("/")) == "package"


@pytest.mark.parametrize(
    "arguments", [("--address", "localhost", "--device", "cpu"), ("--never-rest", "--rest-after", "1")]
)
def test_options_that_contradict_each_other(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["render", "anna", "speech.wav", "-o", str(tmp_path / "out.mp4"), *arguments])
    assert done.exit_code == 2 and arguments[0] in done.output and "Usage: " in done.output


async def test_a_frame_that_cannot_be_made_ends_it(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "speech.wav", "pcm_s16le", 16_000, "mono")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    reference = InternalError("1234")

    async def events() -> AsyncIterator[SpeechEvent]:
        yield SpeechEvent(SpeechEventKind.STARTED)
        for i in range(20):
            frame = Frame("anna", i, buffer.getvalue(), (64, 64, 3), error=reference if i == 15 else None)
            yield SpeechEvent(SpeechEventKind.FRAME, frame)

    written: list[int] = []
    with pytest.raises(InternalError) as caught:
        await render_video(events(), recording, tmp_path / "out.mp4", crf=18, on_frame=written.append)
    assert caught.value is reference and written == list(range(1, 16))
    assert os.listdir(tmp_path) == ["speech.wav"]


async def test_the_loop_goes_on_while_a_frame_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = write_recording(tmp_path / "speech.wav", "pcm_s16le", 16_000, "mono")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    loop, looped = asyncio.get_running_loop(), threading.Event()

    def write(self: object, frame: np.ndarray) -> None:
        loop.call_soon_threadsafe(looped.set)
        assert looped.wait(TIMEOUT_S)

    async def events() -> AsyncIterator[SpeechEvent]:
        yield SpeechEvent(SpeechEventKind.FRAME, Frame("anna", 0, buffer.getvalue(), (64, 64, 3)))

    monkeypatch.setattr("lipsync.engine.mux.TalkingVideoWriter.write", write)
    with pytest.raises(MediaError, match="no frame was written"):
        await render_video(events(), recording, tmp_path / "out.mp4", crf=18, on_frame=lambda done: None)
    assert looped.is_set()


@pytest.mark.parametrize(
    ("number", "returncode", "said", "remote"),
    [
        (signal.SIGINT, 130, "interrupted", False),
        (signal.SIGTERM, 143, "terminated", True),
    ],
)
def test_a_signal_leaves_no_broken_file(
    models: Path,
    server: ServerProcess,
    tmp_path: Path,
    number: signal.Signals,
    returncode: int,
    said: str,
    remote: bool,
) -> None:
    recording = write_recording(tmp_path / "speech.wav", "pcm_s16le", 16_000, "mono", 300)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.mp4").write_text("the one before")
    where = ["anna", "--address", server.address] if remote else [str(models / "anna")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lipsync", "render", *where, str(recording), "-o", str(folder / "out.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(path.suffix == ".part" for path in folder.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output, errors.strip()) == (returncode, "", f"lipsync: {said}")
    assert [path.name for path in folder.iterdir()] == ["out.mp4"]
    assert (folder / "out.mp4").read_text() == "the one before"
