"""Speech into what the network hears: mel spectrogram → audio encoder → one feature row a video frame → windows.

The numbers are those of the training recipe (Wav2Lip's mel spectrogram, SyncTalk_2D's AVE encoder and windows), kept to
the digit: another mel spectrogram moves nobody's lips correctly. Everything is numpy and torch.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipsync.engine.unet import load_weights, unwrap_state_dict
from lipsync.errors import CheckpointError, MediaError
from lipsync.recordings import decoded

Float32 = npt.NDArray[np.float32]

SAMPLE_RATE_HZ = 16_000
VIDEO_FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // VIDEO_FPS  # 640 samples, 40 ms
assert SAMPLES_PER_FRAME * VIDEO_FPS == SAMPLE_RATE_HZ

N_FFT = 800  # 50 ms; also the length of the window
HOP_LENGTH = 200  # 12.5 ms
MEL_ROWS_PER_SECOND = SAMPLE_RATE_HZ // HOP_LENGTH  # 80
assert MEL_ROWS_PER_SECOND * HOP_LENGTH == SAMPLE_RATE_HZ
N_MELS = 80
MEL_MIN_HZ = 55.0
MEL_MAX_HZ = 7600.0
PRE_EMPHASIS = 0.97
FLOOR_AMPLITUDE = 1e-5
REFERENCE_DB = 20.0
MIN_DB = -100.0
MAX_ABS_VALUE = 4.0  # the spectrogram is scaled to -4..4

MEL_ROWS_AT_A_TIME = 16
"""Rows that are computed together, always in a block of this many and in the same place of it: matrix products of other
sizes round differently, and live audio must give the bits of the whole file."""

MEL_ROWS_PER_FEATURE = 16  # 200 ms of sound for each feature row
SAMPLES_PER_FEATURE = (MEL_ROWS_PER_FEATURE - 1) * HOP_LENGTH  # 3000: less is too little for a single one
FEATURE_WIDTH = 512
WINDOW_ROWS_BEFORE = {16: 8, 8: 4}
"""Feature rows of a window that lie before its frame, by the window's length."""

MAX_AUDIO_SECONDS = 4 * 3600
"""Longer recordings are refused: at 16 kHz this is already 460 MB of samples."""


@dataclass(frozen=True)
class AudioFrontEnd:
    """How one kind of audio feature is stored, a row a video frame, and shown to the network.

    Attributes:
        name: "ave", "hubert" or "wenet".
        file_name: the feature file in a package.
        row_shape: of one row of that file.
    """

    name: str
    file_name: str
    row_shape: tuple[int, ...]


FRONT_ENDS = (
    AudioFrontEnd("ave", "aud_ave.npy", (512,)),
    AudioFrontEnd("hubert", "aud_hu.npy", (2, 1024)),
    AudioFrontEnd("wenet", "aud_wenet.npy", (16, 512)),
)


def read_audio(path: str | os.PathLike[str]) -> npt.NDArray[np.int16]:
    """Read the first audio track of any file that FFmpeg knows (WAV, MP3, M4A, MP4 ...).

    Returns samples: (n,) int16, mono, 16 kHz. Raises MediaError.
    """
    name = Path(path).name
    parts: list[npt.NDArray[np.int16]] = []
    total = 0
    for samples in decoded(path):
        parts.append(samples.astype(np.int16, copy=False))
        total += len(samples)
        if total > MAX_AUDIO_SECONDS * SAMPLE_RATE_HZ:
            raise MediaError(f"{name}: longer than {MAX_AUDIO_SECONDS // 3600} hours; cut it into parts")
    if not total:
        raise MediaError(f"{name}: the audio track is empty")
    return np.concatenate(parts)


def write_wav(path: Path, samples: npt.NDArray[np.int16]) -> None:
    """Write (n,) int16 samples as mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())


def _hz_to_mel(hz: float) -> float:
    # Slaney's scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998).
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _mel_to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@cache
def mel_filters() -> Float32:
    """Triangular mel filters of unit area (Slaney's norm): (N_MELS, N_FFT // 2 + 1) float32."""
    edges = _mel_to_hz(np.linspace(_hz_to_mel(MEL_MIN_HZ), _hz_to_mel(MEL_MAX_HZ), N_MELS + 2))
    bins = np.linspace(0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def to_float(samples: npt.NDArray[np.generic]) -> Float32:
    """int16 samples, or floats in -1..1, as float32 in -1..1. Raises MediaError for anything else."""
    if samples.ndim != 1:
        raise MediaError(f"audio samples have shape {samples.shape}; expected one channel, (n,)")
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32768)
    if not np.issubdtype(samples.dtype, np.floating):
        raise MediaError(f"audio samples are {samples.dtype}; expected int16, or floating point in -1..1")
    if not bool(np.isfinite(samples).all()):
        raise MediaError("audio samples hold NaN or infinity")
    return samples.astype(np.float32)


def mel_spectrogram(samples: npt.NDArray[np.generic]) -> Float32:
    """Scaled mel spectrogram in decibels.

    Args:
        samples: (n,) int16, or floating point in -1..1; mono, 16 kHz.
    Returns mel: (1 + n // 200, 80) float32 in -4..4, 80 rows a second.
    Raises MediaError if the samples are of another kind, or none.
    """
    signal = to_float(samples)
    if not len(signal):
        raise MediaError("no audio samples")
    mel = MelStream()
    return np.concatenate((mel.push(signal), mel.finish()))


class MelStream:
    """The mel spectrogram of a recording that is still coming in: its rows are those of the whole, whatever the pieces.

    A row is there once the 25 ms after its middle are.
    """

    def __init__(self) -> None:
        self._n_samples = 0
        self._n_rows = 0
        self._last = np.float32(0)
        # What the current block of rows reads and the next will, from the block's first sample on; padding in front.
        self._signal = np.zeros(N_FFT // 2, np.float32)

    def push(self, samples: Float32) -> Float32:
        """More samples: (n,) float32 in -1..1. Returns the rows that are complete now: (k, 80) float32."""
        if len(samples):
            before = np.concatenate(([self._last], samples[:-1])) if self._n_samples else samples[:-1]
            emphasized = samples.copy()
            emphasized[len(samples) - len(before) :] -= np.float32(PRE_EMPHASIS) * before
            self._last = samples[-1]
            self._n_samples += len(samples)
            self._signal = np.concatenate((self._signal, emphasized))
        return self._rows_to(max(0, (self._n_samples - N_FFT // 2) // HOP_LENGTH + 1))

    def finish(self) -> Float32:
        """The rows that reach beyond the recording's end, where it counts as zero."""
        return self._rows_to(1 + self._n_samples // HOP_LENGTH)

    def rows_if_silent(self, n_rows: int) -> Float32:
        """The next rows if nothing but silence followed: (n_rows, 80) float32. What is pushed later is unaffected."""
        within = self._n_rows % MEL_ROWS_AT_A_TIME
        signal, parts = self._signal, [np.empty((0, N_MELS), np.float32)]
        if self._n_samples:
            signal = np.append(signal, np.float32(-PRE_EMPHASIS) * self._last)
        n_heard = -(-len(signal) // HOP_LENGTH) - within  # rows that hear anything
        for first in range(0, within + min(n_rows, max(0, n_heard)), MEL_ROWS_AT_A_TIME):
            parts.append(_mel_block(signal[first * HOP_LENGTH :]))
        rows = np.concatenate(parts)[within:][:n_rows]
        return np.concatenate((rows, np.full((n_rows - len(rows), N_MELS), -MAX_ABS_VALUE, np.float32)))

    def _rows_to(self, end: int) -> Float32:
        parts = [np.empty((0, N_MELS), np.float32)]
        while self._n_rows < end:
            within = self._n_rows % MEL_ROWS_AT_A_TIME
            n = min(MEL_ROWS_AT_A_TIME - within, end - self._n_rows)
            parts.append(_mel_block(self._signal)[within : within + n])
            self._n_rows += n
            if within + n == MEL_ROWS_AT_A_TIME:
                self._signal = self._signal[MEL_ROWS_AT_A_TIME * HOP_LENGTH :]
        return np.concatenate(parts)


@cache
def _hann_window() -> Float32:
    """Periodic: (N_FFT,) float32."""
    return np.hanning(N_FFT + 1)[:-1].astype(np.float32)


def _mel_block(signal: Float32) -> Float32:
    """MEL_ROWS_AT_A_TIME rows from the beginning of a signal, emphasized already; beyond its end it counts as zero.

    In numpy: torch's threads wait for cores that the network uses, up to a hundred times as long as this takes.
    """
    block = np.zeros((MEL_ROWS_AT_A_TIME - 1) * HOP_LENGTH + N_FFT, np.float32)
    n = min(len(block), len(signal))
    block[:n] = signal[:n]
    frames = np.lib.stride_tricks.sliding_window_view(block, N_FFT)[::HOP_LENGTH] * _hann_window()
    mel = np.abs(np.fft.rfft(frames)) @ mel_filters().T
    level_db = 20 * np.log10(np.maximum(mel, np.float32(FLOOR_AMPLITUDE))) - REFERENCE_DB
    scaled = 2 * MAX_ABS_VALUE * (level_db - MIN_DB) / -MIN_DB - MAX_ABS_VALUE
    return scaled.clip(-MAX_ABS_VALUE, MAX_ABS_VALUE).astype(np.float32)


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU; with the input added before the ReLU where `residual`."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int, stride: int | tuple[int, int], padding: int, *, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.conv_block = nn.Sequential(nn.Conv2d(n_in, n_out, kernel, stride, padding), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_block(x)
        return functional.relu(x + y if self.residual else y)


class AudioEncoder(nn.Module):
    """AVE audio encoder: [batch, 1, 80, 16] mel float, 200 ms, to [batch, 512] float.

    Args:
        widths: channels of the five stages; the last is the feature's width.
    """

    def __init__(self, widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, FEATURE_WIDTH)) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.audio_encoder = nn.Sequential(
            ConvBlock(1, a, 3, 1, 1),  # 80 x 16
            ConvBlock(a, a, 3, 1, 1, residual=True),
            ConvBlock(a, a, 3, 1, 1, residual=True),
            ConvBlock(a, b, 3, (3, 1), 1),  # 27 x 16
            ConvBlock(b, b, 3, 1, 1, residual=True),
            ConvBlock(b, b, 3, 1, 1, residual=True),
            ConvBlock(b, c, 3, 3, 1),  # 9 x 6
            ConvBlock(c, c, 3, 1, 1, residual=True),
            ConvBlock(c, c, 3, 1, 1, residual=True),
            ConvBlock(c, d, 3, (3, 2), 1),  # 3 x 3
            ConvBlock(d, d, 3, 1, 1, residual=True),
            ConvBlock(d, e, 3, 1, 0),  # 1 x 1
            ConvBlock(e, e, 1, 1, 0),
        )

    @property
    def blocks(self) -> list[ConvBlock]:
        """Its convolutions, in the order in which the sound goes through them."""
        return [block for block in self.audio_encoder if isinstance(block, ConvBlock)]

    def forward(self, mel: Tensor) -> Tensor:
        return cast(Tensor, self.audio_encoder(mel)).flatten(1)


def encoder_from_state_dict(checkpoint: Mapping[str, Any]) -> AudioEncoder:
    """The audio encoder that a checkpoint holds, float32, in eval mode, at any width. Raises CheckpointError."""
    state = unwrap_state_dict(checkpoint)
    keys = [f"audio_encoder.{i}.conv_block.0.weight" for i in (0, 3, 6, 9, 11)]
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"not an AVE audio encoder: the state dict has no key {missing[0]!r}")
    a, b, c, d, e = (int(state[key].shape[0]) for key in keys)
    if e != FEATURE_WIDTH:
        raise CheckpointError(f"the audio encoder gives features of width {e}, expected {FEATURE_WIDTH}")
    encoder = AudioEncoder((a, b, c, d, e))
    load_weights(encoder, state)
    return encoder.eval()


def feature_count(n_mel_rows: int) -> int:
    """Feature rows (video frames) that a mel spectrogram of this many rows gives."""
    inner = int((n_mel_rows - MEL_ROWS_PER_FEATURE) / MEL_ROWS_PER_SECOND * VIDEO_FPS) + 2
    return inner + 2  # the first and the last row are repeated once


def first_mel_row(feature: int) -> int:
    """Where the 16 mel rows of a feature begin; the repeated first feature is not counted."""
    return int(MEL_ROWS_PER_SECOND * feature / VIDEO_FPS)


class FeatureStream:
    """The features of a recording that is still coming in: its rows are those of the whole, whatever the pieces.

    Feature i is there once the sound up to about 0.17 s after the start of video frame i is.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        """`encoder`: [1, 1, 80, 16] mel to [1, 512], both float32: an AudioEncoder."""
        self._encoder = encoder
        self._mel_stream = MelStream()
        self._mel = np.empty((0, N_MELS), np.float32)
        self._n_dropped = 0  # mel rows that no feature will read any more
        self._n_samples = 0
        self._n_inner = 0  # features, not counting the first and the last, which are repeated
        self._last: Float32 | None = None
        self._of_silence: Float32 | None = None

    def push(self, samples: Float32) -> Float32:
        """More samples: (n,) float32 in -1..1, 16 kHz. Returns the rows that are complete now: (k, 512) float32."""
        self._n_samples += len(samples)
        self._mel = np.concatenate((self._mel, self._mel_stream.push(samples)))
        n_mel = self._n_dropped + len(self._mel)
        end = self._n_inner
        while first_mel_row(end) + MEL_ROWS_PER_FEATURE <= n_mel:
            end += 1
        return self._rows_to(end, n_mel)

    def finish(self) -> Float32:
        """The rows that reach beyond the recording's end. Raises MediaError if it was too short for a feature."""
        self._mel = np.concatenate((self._mel, self._mel_stream.finish()))
        n_mel = self._n_dropped + len(self._mel)
        if n_mel < MEL_ROWS_PER_FEATURE:
            raise MediaError(
                f"{self._n_samples} audio samples are too few: a feature needs {SAMPLES_PER_FEATURE} (0.19 s)"
            )
        rows = self._rows_to(feature_count(n_mel) - 2, n_mel)
        assert self._last is not None
        return np.concatenate((rows, self._last))

    def rows_if_silent(self, n_rows: int) -> Float32:
        """The next rows if nothing but silence followed: (n_rows, 512) float32. What is pushed later is unaffected."""
        n_known = self._n_inner + (self._n_inner > 0)
        inner = [max(0, row - 1) for row in range(n_known, n_known + n_rows)]  # the first is repeated
        n_mel = first_mel_row(inner[-1]) + MEL_ROWS_PER_FEATURE - self._n_dropped - len(self._mel)
        mel = np.concatenate((self._mel, self._mel_stream.rows_if_silent(max(0, n_mel))))
        made: dict[int, Float32] = {}
        with torch.inference_mode():
            for feature in inner:
                start = first_mel_row(feature) - self._n_dropped
                heard = mel[start : start + MEL_ROWS_PER_FEATURE]
                if feature not in made:
                    made[feature] = self._encoded(heard) if (heard > -MAX_ABS_VALUE).any() else self._silent()
        return np.concatenate([made[feature] for feature in inner])

    def _silent(self) -> Float32:
        """The feature of silence."""
        if self._of_silence is None:
            self._of_silence = self._encoded(np.full((MEL_ROWS_PER_FEATURE, N_MELS), -MAX_ABS_VALUE, np.float32))
        return self._of_silence

    def _encoded(self, mel: Float32) -> Float32:
        # One at a time: batches round differently.
        return self._encoder(torch.from_numpy(np.ascontiguousarray(mel.T))[None, None]).numpy()

    def _rows_to(self, end: int, n_mel: int) -> Float32:
        """Features up to `end`, of a recording that has `n_mel` mel rows so far."""
        parts = [np.empty((0, FEATURE_WIDTH), np.float32)]
        with torch.inference_mode():
            for feature in range(self._n_inner, end):
                start = min(first_mel_row(feature), n_mel - MEL_ROWS_PER_FEATURE) - self._n_dropped
                self._last = self._encoded(self._mel[start : start + MEL_ROWS_PER_FEATURE])
                parts += [self._last] if feature else [self._last, self._last]
        if end > self._n_inner:
            self._n_inner = end
            n = min(first_mel_row(end), n_mel - MEL_ROWS_PER_FEATURE) - self._n_dropped
            self._mel = self._mel[n:]
            self._n_dropped += n
        return np.concatenate(parts)


def audio_features(encoder: Callable[[Tensor], Tensor], samples: npt.NDArray[np.generic]) -> Float32:
    """One feature row a video frame, for a whole recording.

    Args:
        encoder: [1, 1, 80, 16] mel to [1, 512], both float32: an AudioEncoder.
        samples: (n,) int16, or floating point in -1..1; mono, 16 kHz; at least 0.2 s.
    Returns (frames, 512) float32.
    Raises MediaError if there is too little sound, or it is of another kind.
    """
    features = FeatureStream(encoder)
    return np.concatenate((features.push(to_float(samples)), features.finish()))


def feature_window(features: npt.NDArray[np.float32], frame: int, n_rows: int = 16) -> Float32:
    """The feature rows around a video frame, zeros where there are none.

    Args:
        features: (n, *row_shape) float32; may be a memory map.
        frame: the video frame; may lie outside the features.
        n_rows: the window's length: 16 reaches from frame - 8 to frame + 7, 8 from frame - 4 to frame + 3.
    Returns (n_rows, *row_shape) float32.
    """
    start = frame - WINDOW_ROWS_BEFORE[n_rows]
    window = np.zeros((n_rows, *features.shape[1:]), np.float32)
    first, last = max(start, 0), min(start + n_rows, len(features))
    if first < last:
        window[first - start : last - start] = features[first:last]
    return window
