"""Expected outputs of the networks and the audio pipeline; README.md beside this says what they are."""

from pathlib import Path

GOLDEN = Path(__file__).parent
