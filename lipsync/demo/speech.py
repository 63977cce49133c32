"""What the presenter says, and the shapes that a mouth takes for it.

A recording ships with a timeline: which phoneme starts when, as the synthesiser placed it. Each phoneme has a mouth
shape; the shapes are blended over time as those of a speaking person are (coarticulation), while lips that must touch
(m, b, p, and pauses) do touch.
"""

from __future__ import annotations

import json
import wave
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS

Float32 = npt.NDArray[np.float32]

ASSETS = Path(__file__).parent / "assets"

TRACK_HZ = 200
"""Rate at which shapes are blended, before one is taken per video frame."""
BLEND_S = 0.036
"""Standard deviation of the blend: neighbouring phonemes within about 80 ms share a shape."""
CLOSURE_S = 0.018
"""The same for lips that must touch: short, or they would never close at 25 frames a second."""
CLOSURE_GAIN = 1.5
"""So that even a 50 ms closure is complete in the frame at its middle."""


@dataclass(frozen=True)
class Mouth:
    """The shape of the mouth, each value 0 (none) to 1 (full), `width` -1 (narrow) to 1 (spread)."""

    opening: float = 0.0
    width: float = 0.0
    rounding: float = 0.0
    teeth: float = 0.0
    tuck: float = 0.0
    """Lower lip under the upper teeth, as for f and v."""
    tongue: float = 0.0

    def as_array(self) -> Float32:
        """(6,) float32, in the order of the fields."""
        return np.array(astuple(self), np.float32)

    @classmethod
    def from_array(cls, values: npt.NDArray[np.floating]) -> Mouth:
        """From (6,) values in the order of the fields."""
        return cls(*(float(v) for v in values))


N_SHAPE_VALUES = len(fields(Mouth))
CLOSED = Mouth()

_SHAPES: dict[str, Mouth] = {
    # vowels: opening, width, rounding, teeth, tuck, tongue
    "a": Mouth(0.95, 0.15, 0.0, 0.5, 0.0, 0.2),
    "æ": Mouth(0.85, 0.55, 0.0, 0.7, 0.0, 0.2),
    "ɑ": Mouth(1.00, -0.05, 0.0, 0.4, 0.0, 0.1),
    "ɐ": Mouth(0.70, 0.1, 0.0, 0.5, 0.0, 0.2),
    "ʌ": Mouth(0.68, 0.1, 0.0, 0.5, 0.0, 0.2),
    "ɔ": Mouth(0.78, -0.5, 0.65, 0.2, 0.0, 0.0),
    "ɒ": Mouth(0.82, -0.35, 0.45, 0.2, 0.0, 0.0),
    "o": Mouth(0.55, -0.7, 0.9, 0.1, 0.0, 0.0),
    "u": Mouth(0.28, -1.0, 1.0, 0.0, 0.0, 0.0),
    "ʊ": Mouth(0.36, -0.75, 0.75, 0.1, 0.0, 0.0),
    "e": Mouth(0.50, 0.7, 0.0, 0.8, 0.0, 0.3),
    "ɛ": Mouth(0.62, 0.5, 0.0, 0.7, 0.0, 0.3),
    "ɜ": Mouth(0.45, -0.2, 0.35, 0.5, 0.0, 0.3),
    "ɚ": Mouth(0.38, -0.2, 0.35, 0.5, 0.0, 0.3),
    "ə": Mouth(0.42, 0.1, 0.0, 0.6, 0.0, 0.2),
    "ɪ": Mouth(0.38, 0.55, 0.0, 0.9, 0.0, 0.3),
    "i": Mouth(0.30, 0.95, 0.0, 1.0, 0.0, 0.3),
    "ᵻ": Mouth(0.34, 0.4, 0.0, 0.9, 0.0, 0.3),
    # lips together
    "m": CLOSED,
    "b": CLOSED,
    "p": CLOSED,
    # lower lip to the teeth
    "f": Mouth(0.12, 0.15, 0.0, 0.9, 1.0, 0.0),
    "v": Mouth(0.12, 0.15, 0.0, 0.9, 1.0, 0.0),
    # rounded
    "w": Mouth(0.18, -1.0, 1.0, 0.0, 0.0, 0.0),
    "ʍ": Mouth(0.18, -1.0, 1.0, 0.0, 0.0, 0.0),
    "ɹ": Mouth(0.28, -0.5, 0.6, 0.4, 0.0, 0.2),
    "r": Mouth(0.28, -0.5, 0.6, 0.4, 0.0, 0.2),
    "ʃ": Mouth(0.24, -0.55, 0.7, 1.0, 0.0, 0.0),
    "ʒ": Mouth(0.24, -0.55, 0.7, 1.0, 0.0, 0.0),
    # teeth nearly together
    "s": Mouth(0.16, 0.5, 0.0, 1.0, 0.0, 0.0),
    "z": Mouth(0.16, 0.5, 0.0, 1.0, 0.0, 0.0),
    "j": Mouth(0.24, 0.7, 0.0, 1.0, 0.0, 0.2),
    # tongue
    "t": Mouth(0.20, 0.3, 0.0, 0.9, 0.0, 0.5),
    "d": Mouth(0.20, 0.3, 0.0, 0.9, 0.0, 0.5),
    "n": Mouth(0.22, 0.25, 0.0, 0.8, 0.0, 0.6),
    "ɾ": Mouth(0.22, 0.25, 0.0, 0.8, 0.0, 0.6),
    "l": Mouth(0.34, 0.2, 0.0, 0.7, 0.0, 1.0),
    "ɫ": Mouth(0.34, 0.0, 0.1, 0.6, 0.0, 1.0),
    "θ": Mouth(0.24, 0.2, 0.0, 0.9, 0.0, 1.0),
    "ð": Mouth(0.24, 0.2, 0.0, 0.9, 0.0, 1.0),
    # throat
    "k": Mouth(0.30, 0.1, 0.0, 0.6, 0.0, 0.2),
    "ɡ": Mouth(0.30, 0.1, 0.0, 0.6, 0.0, 0.2),
    "g": Mouth(0.30, 0.1, 0.0, 0.6, 0.0, 0.2),
    "ŋ": Mouth(0.28, 0.1, 0.0, 0.6, 0.0, 0.2),
    "h": Mouth(0.40, 0.1, 0.0, 0.5, 0.0, 0.2),
    "x": Mouth(0.30, 0.1, 0.0, 0.6, 0.0, 0.2),
    "ʔ": Mouth(0.22, 0.1, 0.0, 0.6, 0.0, 0.2),
}
_LIPS_TOUCH = frozenset("mbp")


@dataclass(frozen=True)
class Phoneme:
    """One phoneme: when it starts, in seconds, and its IPA letters (empty: a pause)."""

    start_s: float
    ipa: str


@dataclass(frozen=True)
class Timeline:
    """What is said in a recording. The last phoneme lasts until `duration_s`."""

    text: str
    duration_s: float
    phonemes: tuple[Phoneme, ...]

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Read the JSON that `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        phonemes = tuple(Phoneme(float(start), str(ipa)) for start, ipa in data["phonemes"])
        return cls(str(data["text"]), float(data["duration_s"]), phonemes)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        data = {
            "text": self.text,
            "duration_s": self.duration_s,
            "phonemes": [[round(p.start_s, 4), p.ipa] for p in self.phonemes],
        }
        path.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")


def frame_count(n_samples: int) -> int:
    """Video frames of a recording of so many samples."""
    return round(n_samples / SAMPLES_PER_FRAME)


def _smooth(track: Float32, sigma_s: float) -> Float32:
    """Blur (n, values) over time with a Gaussian; the ends keep their values."""
    reach = int(np.ceil(3 * sigma_s * TRACK_HZ))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (sigma_s * TRACK_HZ)) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(track, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], axis=1).astype(np.float32)


def mouth_track(timeline: Timeline, n_frames: int) -> Float32:
    """The mouth's shape in every video frame, at the middle of its 40 ms.

    Returns (n_frames, 6) float32: rows for `Mouth.from_array`.
    """
    n_steps = n_frames * TRACK_HZ // VIDEO_FPS + TRACK_HZ // VIDEO_FPS
    shapes = np.zeros((n_steps, N_SHAPE_VALUES), np.float32)
    touching = np.zeros((n_steps, 1), np.float32)
    ends = [p.start_s for p in timeline.phonemes[1:]] + [timeline.duration_s]
    for phoneme, end_s in zip(timeline.phonemes, ends, strict=True):
        letters = [letter for letter in phoneme.ipa if letter in _SHAPES]
        if not letters:
            continue  # a pause: lips closed
        edges = np.linspace(phoneme.start_s, end_s, len(letters) + 1)
        steps = np.clip(np.round(edges * TRACK_HZ).astype(int), 0, n_steps)
        for letter, first, last in zip(letters, steps[:-1], steps[1:], strict=True):
            shapes[first:last] = _SHAPES[letter].as_array()
            touching[first:last] = letter in _LIPS_TOUCH
    blended = _smooth(shapes, BLEND_S)
    closed = np.clip(CLOSURE_GAIN * _smooth(touching, CLOSURE_S), 0, 1)
    blended[:, 0] *= 1 - closed[:, 0]
    blended[:, 3:] *= 1 - closed
    middles = (np.arange(n_frames) * TRACK_HZ + TRACK_HZ // 2) // VIDEO_FPS
    return blended[middles]


def read_wav(path: Path) -> npt.NDArray[np.int16]:
    """The samples of one of our own recordings: (n,) int16, mono, 16 kHz."""
    with wave.open(str(path), "rb") as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, SAMPLE_RATE_HZ):
            raise ValueError(f"{path.name} is not 16-bit mono at {SAMPLE_RATE_HZ} Hz")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
