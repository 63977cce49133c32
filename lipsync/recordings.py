"""Audio files as a client sends them, and as an engine reads them. Importing it takes nothing but Python."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipsync.errors import MediaError
from lipsync.types import SAMPLE_RATES_HZ

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_SAMPLES = 16_000
SAMPLE_RATE_HZ = 16_000
"""What other files than WAV are resampled to: what the network hears."""
SAFE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "wav,w64,mp3,mov,matroska,ogg,flac,aac,aiff,caf,au",
}
"""Recordings alone: a playlist under another name must not make FFmpeg open what it lists."""


def open_recording(path: str | os.PathLike[str]) -> tuple[int, Iterator[bytes]]:
    """A recording's sample rate, and its samples: pieces of s16le, mono.

    WAV files of 16 bits and one channel are read as they are; anything else takes PyAV, of the extra `engine`.
    Raises MediaError.
    """
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            is_wav = file.read(4) == b"RIFF"
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from error
    if is_wav and (opened := _open_wav(path)) is not None:
        return opened
    return SAMPLE_RATE_HZ, _decoded_pieces(path, name)


def _open_wav(path: str | os.PathLike[str]) -> tuple[int, Iterator[bytes]] | None:
    """None if it is of another kind."""
    try:
        file = wave.open(os.fspath(path), "rb")  # noqa: SIM115  # closed when it is read through
    except (wave.Error, EOFError):
        return None
    rate_hz = file.getframerate()
    if file.getnchannels() != 1 or file.getsampwidth() != 2 or rate_hz not in SAMPLE_RATES_HZ:
        file.close()
        return None

    def pieces() -> Iterator[bytes]:
        with file:
            while piece := file.readframes(CHUNK_SAMPLES):
                yield piece

    return rate_hz, pieces()


def _decoded_pieces(path: str | os.PathLike[str], name: str) -> Iterator[bytes]:
    try:
        import av  # noqa: F401  # told here: what it decodes is read later
    except ModuleNotFoundError:
        raise MediaError(
            f"{name}: not a WAV file of 16 bits and one channel, and other files take PyAV: "
            "pip install 'lipsync-server[engine]'"
        ) from None

    return (samples.tobytes() for samples in decoded(path))


def decoded(path: str | os.PathLike[str]) -> Iterator[NDArray[Any]]:
    """The first audio track of any file that FFmpeg knows, in blocks as it is decoded: (n,) int16, mono, 16 kHz.

    Raises MediaError, from reading the blocks.
    """
    import av
    import av.error

    name = Path(path).name
    try:
        with av.open(os.fspath(path), options=SAFE_OPTIONS) as container:
            if not container.streams.audio:
                raise MediaError(f"{name}: no audio track in it; give a WAV, MP3 or M4A file")
            resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
            for compressed in chain(container.decode(audio=0), (None,)):  # None flushes the resampler
                for frame in resampler.resample(compressed):
                    yield frame.to_ndarray().reshape(-1)
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{name}: cannot be read as audio ({error}); give a WAV, MP3 or M4A file") from error
