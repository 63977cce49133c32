"""Synthesise the demo's recordings with espeak-ng, each with its timeline of phonemes.

    python tools/make_demo_speech.py

writes lipsync/demo/assets/speech.{wav,json} and tests/demo/unheard.{wav,json}. Needs libespeak-ng (apt: espeak-ng),
which only this tool and tools/train_demo.py use.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from lipsync.demo.speech import ASSETS, Phoneme, Timeline
from lipsync.engine.audio import SAMPLE_RATE_HZ, write_wav

ROOT = Path(__file__).resolve().parent.parent
PEAK = 0.7  # of full scale, so that every recording is about as loud

SPEECH = (
    "Hello, and welcome. The face that you see is a drawing. "
    "Nobody was filmed for it. "
    "My lips move because a small network heard these words, and painted my mouth, frame by frame."
)
UNHEARD = (
    "Good evening. A warm wind blew over the harbour, and five brave fishermen pushed their boats away. "
    "Above them, the moon was a pale yellow ball. They sang about home."
)


@dataclass(frozen=True)
class Voice:
    """How espeak-ng speaks: words a minute, pitch 0 to 100, pitch range 0 to 100."""

    name: str = "en-us"
    rate: int = 150
    pitch: int = 45
    pitch_range: int = 50


LEAD_S, TAIL_S = 0.2, 0.4
"""Silence before and after the two recordings."""

DEMO_VOICE = Voice("en-us+m3", rate=150, pitch=40)

_RETRIEVAL, _SYNCHRONOUS = 1, 2
_PHONEME_EVENTS, _IPA = 1, 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8 = 1
_EVENT_END, _EVENT_PHONEME = 0, 7


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesiser:
    """espeak-ng by ctypes: text in, samples and phoneme times out. One a process."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise SystemExit("libespeak-ng is not installed (apt install espeak-ng)")
        self._library = ctypes.CDLL(name)
        self._rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS, 200, None, _PHONEME_EVENTS | _IPA)
        if self._rate_hz <= 0:
            raise SystemExit("espeak-ng cannot be initialised: is its data installed?")
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._events: list[Phoneme] = []
        self._callback = _Callback(self._collect)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.int16))
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_PHONEME:
                ipa = bytes(events[i].id.string).decode("utf-8", "ignore")
                self._events.append(Phoneme(events[i].audio_position / 1000, ipa.strip("_:")))
            i += 1
        return 0

    def say(self, text: str, voice: Voice = DEMO_VOICE) -> tuple[npt.NDArray[np.int16], Timeline]:
        """Speak. Returns (n,) int16 samples, mono, 16 kHz, and what is where in them."""
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks, self._events = [], []
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None)
        samples = _resample(np.concatenate(self._chunks), self._rate_hz)
        peak = max(int(np.abs(samples.astype(np.int32)).max()), 1)
        samples = np.round(samples * (PEAK * 32767 / peak)).astype(np.int16)
        duration_s = len(samples) / SAMPLE_RATE_HZ
        return samples, Timeline(text, duration_s, tuple(sorted(self._events, key=lambda p: p.start_s)))


def _resample(samples: npt.NDArray[np.int16], rate_hz: int) -> npt.NDArray[np.int16]:
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate = rate_hz
    frame.time_base = Fraction(1, rate_hz)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def with_silence(
    samples: npt.NDArray[np.int16], timeline: Timeline, lead_s: float, tail_s: float
) -> tuple[npt.NDArray[np.int16], Timeline]:
    """The recording with silence around it."""
    lead, tail = (np.zeros(round(s * SAMPLE_RATE_HZ), np.int16) for s in (lead_s, tail_s))
    padded = np.concatenate((lead, samples, tail))
    phonemes = [Phoneme(0.0, ""), *(Phoneme(p.start_s + lead_s, p.ipa) for p in timeline.phonemes)]
    phonemes.append(Phoneme(timeline.duration_s + lead_s, ""))
    return padded, Timeline(timeline.text, len(padded) / SAMPLE_RATE_HZ, tuple(phonemes))


def main() -> None:
    """Write the demo's recording and the one that only the tests hear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the shipped recording")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "demo", help="folder of the unheard recording")
    arguments = parser.parse_args()
    synthesiser = Synthesiser()
    for folder, name, text in ((arguments.assets, "speech", SPEECH), (arguments.tests, "unheard", UNHEARD)):
        samples, timeline = with_silence(*synthesiser.say(text), LEAD_S, TAIL_S)
        write_wav(folder / f"{name}.wav", samples)
        timeline.save(folder / f"{name}.json")
        print(f"{folder / name}.wav: {timeline.duration_s:.1f} s, {len(timeline.phonemes)} phonemes")


if __name__ == "__main__":
    main()
