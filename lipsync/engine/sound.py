"""A recording's sound as people hear it: its own sample rate, mono or stereo, where the network hears 16 kHz mono."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import SAMPLE_RATE_HZ
from lipsync.errors import MediaError
from lipsync.recordings import SAFE_OPTIONS

Int16 = npt.NDArray[np.int16]

RATES_HZ = (32_000, 44_100, 48_000, 64_000, 88_200, 96_000)
"""What AAC takes and sound keeps. AAC also takes 7350 to 24000, but in blocks of 1024 samples, which are longer than a
frame of the video there: the sound would end later than the picture."""
HIGHEST_RATE_HZ = 48_000
"""Of recordings whose rate AAC does not reach."""
LAYOUTS = {1: "mono", 2: "stereo"}
"""By the number of channels; more than two are mixed down."""


@dataclass(frozen=True, eq=False)
class Sound:
    """Sound to be written beside a video.

    Attributes:
        rate_hz: samples a second, one of RATES_HZ.
        n_channels: 1 or 2.
        blocks: (n, n_channels) int16 each, of any length; read once.
    """

    rate_hz: int
    n_channels: int
    blocks: Iterable[Int16]

    @property
    def layout(self) -> str:
        """FFmpeg's name for the channels."""
        return LAYOUTS[self.n_channels]

    @classmethod
    def of_samples(cls, samples: npt.NDArray[np.int16], rate_hz: int = SAMPLE_RATE_HZ) -> Sound:
        """Of samples at any rate: (n,) int16 mono, or (n, 1 or 2) int16."""
        if not len(samples):
            return cls(RATES_HZ[0], 1, ())
        interleaved = np.ascontiguousarray(samples).reshape(1, -1)
        layout = LAYOUTS[interleaved.size // len(samples)]
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
        frame.sample_rate = rate_hz
        return _sound_of(frame, ())


def sound_rate(rate_hz: int) -> int:
    """The rate that a recording's sound is written at: its own or a multiple of it where there is one in RATES_HZ."""
    multiples = [rate for rate in RATES_HZ if rate % rate_hz == 0]
    higher = [rate for rate in RATES_HZ if rate >= rate_hz]
    return (multiples or higher or [HIGHEST_RATE_HZ])[0]


@contextlib.contextmanager
def open_sound(path: str | os.PathLike[str]) -> Iterator[Sound]:
    """The first audio track of any file that FFmpeg knows, decoded as it is read.

    Raises MediaError, also from reading the blocks.
    """
    name = Path(path).name
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(os.fspath(path), options=SAFE_OPTIONS))
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable(name, error) from error
        if not container.streams.audio:
            raise MediaError(f"{name}: no audio track in it; give a WAV, MP3 or M4A file")
        frames = _decoded(container, name)
        first = next(frames, None)
        if first is None:
            raise MediaError(f"{name}: the audio track is empty")
        yield _sound_of(first, frames)


def _decoded(container: av.container.InputContainer, name: str) -> Iterator[av.AudioFrame]:
    try:
        yield from container.decode(audio=0)
    except (av.error.FFmpegError, OSError) as error:
        raise _unreadable(name, error) from error


def _sound_of(first: av.AudioFrame, others: Iterable[av.AudioFrame]) -> Sound:
    rate_hz, n_channels = sound_rate(first.sample_rate), min(2, first.layout.nb_channels)
    resampler = av.AudioResampler(format="s16", layout=LAYOUTS[n_channels], rate=rate_hz)

    def blocks() -> Iterator[Int16]:
        decoded: Iterator[av.AudioFrame | None] = chain((first,), others, (None,))  # None flushes the resampler
        for frame in decoded:
            for resampled in resampler.resample(frame):
                samples: npt.NDArray[Any] = resampled.to_ndarray()
                yield samples.reshape(-1, n_channels).astype(np.int16, copy=False)

    return Sound(rate_hz, n_channels, blocks())


def _unreadable(name: str, error: Exception) -> MediaError:
    return MediaError(f"{name}: cannot be read as audio ({error}); give a WAV, MP3 or M4A file")
