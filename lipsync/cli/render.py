"""`lipsync render`: a recording and a package, or a model of a server, into a video."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lipsync.cli.stopping import Termination
from lipsync.cli.terminal import console, count, error_console, progress_bars, size
from lipsync.config import MODEL_NAME, EngineConfig
from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS, read_audio
from lipsync.engine.engine import Engine
from lipsync.engine.mux import TalkingVideoWriter
from lipsync.engine.session import SpeechSession
from lipsync.engine.sound import open_sound
from lipsync.errors import MediaError
from lipsync.transport.client import Client
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions

JPEG_QUALITY = 95
"""Of the frames on their way to the video: the finest there is."""
SUFFIX = ".mp4"

Events = AsyncGenerator[SpeechEvent, None]
OnFrame = Callable[[int], None]
"""Called with the number of frames that are written."""


@dataclass(frozen=True)
class Rendered:
    """What a video came to. `took_s`: from the first audio sent to the finished file, in seconds."""

    n_frames: int
    n_bytes: int
    took_s: float


async def run_render(
    model: str,
    audio: Path,
    target: Path,
    *,
    client: Client | None,
    speech: SpeechOptions,
    engine: EngineConfig,
    crf: int,
    termination: Termination,
) -> None:
    """Write a video, with progress, and say what was written.

    Args:
        model: a package's folder; with `client`, the name of a model that its server has loaded.
        audio: any file that FFmpeg reads as audio.
        target: the video; whatever is there stays until the new one is whole.
        speech: which frames and when the mouth rests. Sample rate and encoding are this function's own.
        engine: for a package.
        crf: the video's quality, 0 to 51.
    Raises Terminated, and LipsyncError: files that cannot be read or written, a frame that could not be made.
    """
    with termination.cancels_task():
        await asyncio.to_thread(check_target, target, audio)
        samples = await asyncio.to_thread(read_audio, audio)
        n_frames = -(-len(samples) // SAMPLES_PER_FRAME)
        pcm = samples.astype("<i2").tobytes()
        if client is None:
            opened = package_events(Path(model), pcm, speech, engine)
        else:
            opened = server_events(client, model, pcm, speech)
        async with opened as events:
            with frames_bar("rendering", n_frames) as on_frame:
                rendered = await render_video(events, audio, target, crf=crf, on_frame=on_frame)
    console.print(
        f"wrote {target}: {rendered.n_frames / VIDEO_FPS:.2f} s, {count(rendered.n_frames, 'frame')}, "
        f"made at {rendered.n_frames / rendered.took_s:.1f} frames/s, {size(rendered.n_bytes)}",
        markup=False,
        soft_wrap=True,
    )


def check_target(target: Path, audio: Path) -> None:
    """Raises MediaError if no video can be written there: better now than after all frames are made."""
    if target.suffix.lower() != SUFFIX:
        raise MediaError(f"{target}: only MP4 is written; choose a name that ends in {SUFFIX}")
    if target.is_dir():
        raise MediaError(f"{target}: this is a folder; choose a name for a file")
    if not target.parent.is_dir():
        raise MediaError(f"{target}: there is no folder {target.parent}; make it first, or choose another one")
    if target.exists() and audio.exists() and target.samefile(audio):
        raise MediaError(f"{target}: this is the recording itself; choose another name for the video")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise MediaError(
            f"{target}: folder {target.parent} cannot be written ({error.strerror}); choose another one"
        ) from error


@contextlib.asynccontextmanager
async def package_events(
    folder: Path, pcm: bytes, options: SpeechOptions, config: EngineConfig
) -> AsyncIterator[Events]:
    """Load a package, and have it say a recording: `pcm` as `options` say."""
    async with Engine(config) as engine:
        name = model_name(folder)
        with progress_bars(f"{name}:") as on_progress:
            await engine.load(folder, name=name, progress=on_progress)
        async with (
            await engine.speech(name, options) as session,
            contextlib.aclosing(_said(session, pcm)) as events,
        ):
            yield events


def model_name(folder: Path) -> str:
    """A folder may be called what a model may not."""
    allowed = re.sub(r"[^A-Za-z0-9._-]", "_", folder.absolute().name)[:64]
    return allowed if MODEL_NAME.fullmatch(allowed) else "package"


async def _said(session: SpeechSession, pcm: bytes) -> Events:
    async def send() -> None:
        await session.send(pcm)
        await session.end()

    # what goes wrong in it ends the session, and is raised below
    sender = asyncio.create_task(send())
    try:
        async for event in session:
            yield event
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


@contextlib.asynccontextmanager
async def server_events(client: Client, model: str, pcm: bytes, options: SpeechOptions) -> AsyncIterator[Events]:
    """Have a server's model say a recording, `pcm` as `options` say, and close the client."""
    async with client:
        spoken = cast(Events, client.speak([pcm], model=model, options=options))
        async with contextlib.aclosing(spoken) as events:
            yield events


async def render_video(
    events: AsyncIterator[SpeechEvent], audio: Path, target: Path, *, crf: int, on_frame: OnFrame
) -> Rendered:
    """Write FRAME events and the recording that they say into a file. Decoding and encoding run in a thread.

    Raises MediaError, the error of a frame that could not be made, and what `events` raise; then nothing is written.
    """
    start_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        sound = await asyncio.to_thread(stack.enter_context, open_sound(audio))
        writer = TalkingVideoWriter(target, sound=sound, crf=crf)
        try:
            async for event in events:
                if event.kind is SpeechEventKind.FRAME and event.frame is not None:
                    jpeg = event.frame.raise_for_error().jpeg
                    await asyncio.to_thread(_add, writer, jpeg)
                    on_frame(writer.n_frames)
            n_bytes = await asyncio.to_thread(_finish, writer)
        finally:
            # after a cancellation the thread may still be writing, and closing waits for it
            await asyncio.shield(asyncio.to_thread(writer.close))
    return Rendered(writer.n_frames, n_bytes, time.perf_counter() - start_s)


def _add(writer: TalkingVideoWriter, jpeg: bytes) -> None:
    with Image.open(io.BytesIO(jpeg)) as picture:
        writer.write(np.asarray(picture.convert("RGB")))


def _finish(writer: TalkingVideoWriter) -> int:
    writer.finish()
    return writer.path.stat().st_size


class _FramesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} frames/s")


@contextlib.contextmanager
def frames_bar(title: str, n_frames: int) -> Iterator[OnFrame]:
    """A bar with frames a second, on a terminal; nothing elsewhere. It goes when the work is done."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(_FramesPerSecond(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal) as bars:
        task = bars.add_task(title, total=n_frames)
        yield lambda done: bars.update(task, completed=done)


def speech_options(
    *, start_frame: int, rest_after_s: float | None, quiet_dbfs: float, look_ahead_ms: float | None
) -> SpeechOptions:
    """Of a session whose frames become a video. Raises InvalidRequestError."""
    return SpeechOptions(
        start_frame=start_frame,
        sample_rate_hz=SAMPLE_RATE_HZ,
        jpeg_quality=JPEG_QUALITY,
        look_ahead_ms=look_ahead_ms,
        rest_after_s=rest_after_s,
        quiet_dbfs=quiet_dbfs,
    )
