"""What of a session of live audio must be told again when another replica takes it over.

No I/O: what the client sent and what it was given go in; how to begin anew comes out. Kept is the audio whose frames
the client was not given yet, and as much before it as those depend on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions

CONTEXT_FRAMES = 25
"""Frames of an utterance that are heard again before the first that is made: a window reaches 12 frames back, the
resampler settles within three more, and a mouth comes to rest within 20 with the usual settings."""
ALIGNED_FRAMES = 5
"""Mel rows lie in the same places of every fifth frame: from such a frame on, features come out the same."""


@dataclass
class _Utterance:
    """The audio from one flush to the next, from the byte `n_trimmed` on.

    Attributes:
        first_sample: of the session's input, where it begins.
        flushed: no more belongs to it.
    """

    first_sample: int
    pcm: bytearray = field(default_factory=bytearray)
    n_trimmed: int = 0
    flushed: bool = False


@dataclass(frozen=True)
class Resumption:
    """How another replica goes on.

    Attributes:
        options: to open its session with.
        n_shown: frames of the audio that comes first that are heard and not made again.
        first_sample: what its session counts as 0, in the client's count.
        utterances: audio to send; after each but the last, and the last too if `flushed`, there is a flush.
        flushed: see there.
        n_interrupts: of the client's that were not answered yet: they come before the audio.
        ended: the client said that no more comes.
        over: it was given all that there was to tell.
    """

    options: SpeechOptions
    n_shown: int
    first_sample: int
    utterances: tuple[bytes, ...]
    flushed: bool
    n_interrupts: int
    ended: bool
    over: bool


class Journal:
    """Of one session. What is sent, and what is taken, is noted before it is passed on."""

    def __init__(self, options: SpeechOptions) -> None:
        self._options = options
        self._n_bytes = options.encoding.n_bytes
        self._frame_bytes = options.samples_per_frame * self._n_bytes
        self._utterances: deque[_Utterance] = deque()
        self._received_bytes = 0  # dropped ones included
        self._n_interrupts = 0  # whose INTERRUPTED was not taken
        self._flushed = False  # nothing came since the last flush
        self._ended = False
        self._resting = False
        self.shown = SpeechEvent(SpeechEventKind.FRAME, next_frame=options.start_frame)
        """The last frame that the client was given; before the first, where the session begins."""

    # What the client does

    def sent(self, pcm: bytes) -> None:
        if not self._utterances or self._utterances[-1].flushed:
            self._utterances.append(_Utterance(self._received_bytes // self._n_bytes))
        self._utterances[-1].pcm += pcm
        self._received_bytes += len(pcm)
        self._flushed = False

    def flushed(self) -> None:
        if not self._utterances or self._utterances[-1].flushed:
            self._utterances.append(_Utterance(self._received_bytes // self._n_bytes))  # an END follows nonetheless
        last = self._utterances[-1]
        n_odd = len(last.pcm) % self._n_bytes  # half a sample: nothing will complete it
        del last.pcm[len(last.pcm) - n_odd :]
        self._received_bytes -= n_odd
        last.flushed = self._flushed = True

    def interrupted(self, n_dropped: int) -> None:
        self._utterances.clear()
        self._received_bytes = self._received_bytes // self._n_bytes * self._n_bytes + n_dropped * self._n_bytes
        self._n_interrupts += 1
        self._flushed = False

    def ended(self) -> None:
        if not self._flushed:
            self.flushed()
        self._ended = True

    # What it is given

    def takes(self, event: SpeechEvent) -> bool:
        """Whether an event is for the client: it belongs to what was said before an interrupt, or says what the client
        was told before. Those that are for it are noted."""
        if self._n_interrupts and event.kind is not SpeechEventKind.INTERRUPTED:
            return event.kind is SpeechEventKind.STARTED
        match event.kind:
            case SpeechEventKind.FRAME:
                self.shown = replace(event, frame=None)
                self._resting = event.rest == 1
                self._trim(event.end_sample)
            case SpeechEventKind.SILENCE:
                if self._resting:
                    return False
                self._resting = True
            case SpeechEventKind.END if self._utterances:
                self._utterances.popleft()
            case SpeechEventKind.INTERRUPTED:
                self._n_interrupts -= 1
                self._resting = True
                self.shown = replace(self.shown, next_frame=event.next_frame)
        return True

    def _trim(self, end_sample: int) -> None:
        """Let go of the audio that no frame after this one depends on."""
        if not self._utterances:
            return
        utterance = self._utterances[0]
        n_taken = (end_sample - utterance.first_sample) * self._n_bytes // self._frame_bytes
        first = max(0, n_taken - CONTEXT_FRAMES) // ALIGNED_FRAMES * ALIGNED_FRAMES
        n_old = first * self._frame_bytes - utterance.n_trimmed
        if n_old > 0:
            del utterance.pcm[:n_old]
            utterance.n_trimmed += n_old

    # When it must begin anew

    def resumption(self) -> Resumption:
        """How to go on after the last event that was taken."""
        begins_at, n_shown = self._received_bytes // self._n_bytes, 0
        if self._utterances:
            first = self._utterances[0]
            begins_at = first.first_sample + first.n_trimmed // self._n_bytes
            n_shown = -(-max(0, self.shown.end_sample - begins_at) * self._n_bytes // self._frame_bytes)
        return Resumption(
            options=replace(self._options, start_frame=self.shown.next_frame),
            n_shown=n_shown,
            first_sample=begins_at,
            utterances=tuple(bytes(utterance.pcm) for utterance in self._utterances),
            flushed=bool(self._utterances) and self._utterances[-1].flushed,
            n_interrupts=self._n_interrupts,
            ended=self._ended,
            over=self._ended and not self._utterances and not self._n_interrupts,
        )
