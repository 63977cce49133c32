"""Sound files."""

from __future__ import annotations

import io
import wave


def wav(pcm: bytes, rate_hz: int = 16_000) -> bytes:
    """Samples, mono s16le, as a file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(pcm)
    return file.getvalue()
