"""What is to be said: waiting, sent to a session, and come back as frames. No I/O.

A session answers audio in order, and an utterance is answered before the next one: so that lengths alone tell which
samples belong to a frame, whatever was dropped or sent again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from lipsync.errors import ProtocolError

SAMPLE_BYTES = 2
"""s16le, mono."""
FRAMES_AHEAD = 5
"""Of speech, sent to the server and not shown, beyond what a frame waits for: 0.2 s. It covers what the network and the
way to the server take. More would be lost at an interrupt, and the picture would jump; and a caller that begins with
more than 6 frames counts as one that renders, and gives way to others."""


class Signal(Enum):
    """What goes to a session besides audio."""

    FLUSH = "flush"


@dataclass(eq=False)
class _Utterance:
    """What is said from one `end` to the next; or silence, to rest by.

    Attributes:
        pcm: that did not come back as frames.
        n_sent: bytes of it that the session was sent.
        ended: nothing follows.
        flushed: the session knows.
    """

    pcm: bytearray = field(default_factory=bytearray)
    resting: bool = False
    n_sent: int = 0
    ended: bool = False
    flushed: bool = False


class Script:
    """Speech on its way to a session and back, and marks between it that come out where they were put."""

    def __init__(self, samples_per_frame: int) -> None:
        self._frame_bytes = samples_per_frame * SAMPLE_BYTES
        self._look_ahead_bytes = 0
        self._waiting: deque[_Utterance] = deque()  # bounded by whoever says
        self._sent: deque[_Utterance] = deque()  # the last one may still be being sent
        self._marks: deque[tuple[int, object]] = deque()
        self._n_said = 0  # bytes, all in all
        self._n_given = 0  # of them, to whoever shows; or dropped
        self._n_made = 0  # came back as frames, and were not given

    # In

    def say(self, pcm: bytes) -> None:
        """More speech, in whole samples."""
        if not pcm:
            return
        utterance = self._open
        if utterance is None:
            utterance = _Utterance()
            self._waiting.append(utterance)
        utterance.pcm += pcm
        self._n_said += len(pcm)

    def end(self) -> None:
        """The utterance is over."""
        if self._open is not None:
            self._open.ended = True

    def mark(self, value: object) -> None:
        """Comes out of `due_mark` once all that was said before it was given."""
        self._marks.append((self._n_said, value))

    def interrupt(self) -> tuple[bool, list[object]]:
        """Forget all speech that was not given. Returns whether a session has any of it, and the marks that stood
        behind it."""
        at_server = any(not utterance.resting for utterance in self._sent)
        if at_server:
            self._sent.clear()  # the silence as well: a session drops everything
        self._waiting.clear()
        self._n_given, self._n_made = self._n_said, 0
        marks = [value for _, value in self._marks]
        self._marks.clear()
        return at_server, marks

    @property
    def _open(self) -> _Utterance | None:
        """The utterance that goes on."""
        last = self._waiting[-1] if self._waiting else self._sent[-1] if self._sent else None
        return None if last is None or last.ended else last

    @property
    def n_unshown(self) -> int:
        """Samples that were said and not given."""
        return (self._n_said - self._n_given) // SAMPLE_BYTES

    # To a session

    def begin(self, look_ahead_samples: int) -> None:
        """A session is open, in which a frame waits for so much audio beyond its start."""
        self._look_ahead_bytes = look_ahead_samples * SAMPLE_BYTES

    def lost(self) -> None:
        """The session is gone: what it did not answer goes to the next one."""
        for utterance in reversed(self._sent):
            utterance.n_sent, utterance.flushed = 0, False
            if utterance.pcm and not utterance.resting:
                self._waiting.appendleft(utterance)
        self._sent.clear()

    def next(self) -> bytes | Signal | None:
        """What to send now; None: nothing."""
        if not self._sent or self._sent[-1].flushed:
            if not self.can_begin:
                return None
            self._sent.append(self._waiting.popleft())
        utterance = self._sent[-1]
        n_ahead = self._n_made + sum(one.n_sent for one in self._sent if not one.resting)
        room = max(0, self._look_ahead_bytes + FRAMES_AHEAD * self._frame_bytes - n_ahead)
        end = len(utterance.pcm) if utterance.resting else utterance.n_sent + room
        piece = bytes(utterance.pcm[utterance.n_sent : end])
        utterance.n_sent += len(piece)
        if piece:
            return piece
        if utterance.ended and utterance.n_sent == len(utterance.pcm):
            utterance.flushed = True
            return Signal.FLUSH
        return None

    @property
    def can_begin(self) -> bool:
        """Whether the next utterance can be sent: as soon as a frame comes of it. Until then the face goes on resting,
        which it could not do behind speech that is cut short."""
        return bool(self._waiting) and (self._waiting[0].ended or len(self._waiting[0].pcm) >= self._first_frame_bytes)

    @property
    def _first_frame_bytes(self) -> int:
        return max(self._look_ahead_bytes, self._frame_bytes)

    @property
    def is_quiet(self) -> bool:
        """Whether no speech is sent, nor can be now."""
        return not self.can_begin and all(utterance.resting for utterance in self._sent)

    @property
    def is_cut_short(self) -> bool:
        """Whether all that is left to show gives no frame unless more of it is said, or its end comes."""
        utterance = self._open
        if utterance is None or self.n_unshown * SAMPLE_BYTES != len(utterance.pcm):
            return False
        return len(utterance.pcm) < self._first_frame_bytes

    def rest(self, n_frames: int) -> None:
        """Silence for so many frames goes next."""
        self._sent.append(_Utterance(bytearray(n_frames * self._frame_bytes), resting=True, ended=True))

    @property
    def n_resting(self) -> int:
        """Frames of silence that did not come back."""
        return sum(len(one.pcm) for one in self._sent if one.resting) // self._frame_bytes

    # From a session

    def made(self, n_samples: int) -> tuple[bytes, bool]:
        """The next frame came back. Returns its samples, and whether it is one of silence.

        Raises ProtocolError if so much was not sent.
        """
        n_bytes = n_samples * SAMPLE_BYTES
        utterance = next((one for one in self._sent if one.n_sent), None)
        if utterance is None or not 0 < n_bytes <= utterance.n_sent:
            raise ProtocolError(f"the server sent a frame of {n_samples} samples that it was not sent")
        pcm = bytes(utterance.pcm[:n_bytes])
        del utterance.pcm[:n_bytes]
        utterance.n_sent -= n_bytes
        if not utterance.resting:
            self._n_made += n_bytes
        return pcm, utterance.resting

    def answered(self) -> None:
        """An utterance came back entirely. Raises ProtocolError if none could have."""
        if not self._sent or not self._sent[0].flushed or self._sent[0].pcm:
            raise ProtocolError("the server said that an utterance is over whose frames it did not send")
        self._sent.popleft()

    # Out

    def given(self, pcm: bytes) -> None:
        """A frame of speech goes to whoever shows it."""
        self._n_made -= len(pcm)
        self._n_given += len(pcm)

    @property
    def mark_is_due(self) -> bool:
        return bool(self._marks) and self._marks[0][0] <= self._n_given

    def due_mark(self) -> object:
        """The mark that comes out now."""
        return self._marks.popleft()[1]
