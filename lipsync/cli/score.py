"""`lipsync package score`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lipsync.cli.terminal import add_row, console, count, make_table, progress_bars
from lipsync.quality.card import QualityCard, score_package
from lipsync.quality.criteria import Score

VERDICTS = {True: "good", False: "NOT GOOD", None: "not measured"}


def run_score(folder: Path, *, n_frames: int, device: str, runtime: str, blend: str, as_json: bool) -> bool:
    """Print a package's quality card. Returns False if a score is outside of its limits.

    Raises LipsyncError if the package, its device or a setting cannot be used.
    """
    with progress_bars("scoring:") as on_progress:
        card = score_package(
            folder, n_frames=n_frames, device=device, runtime=runtime, blend=blend, progress=on_progress
        )
    if as_json:
        print(json.dumps(describe(folder, card), indent=2))
    else:
        print_card(card)
    return card.good


def print_card(card: QualityCard) -> None:
    """The card as a table, and below it how it was measured."""
    stretches = "one stretch" if card.n_stretches == 1 else f"{card.n_stretches} stretches"
    frames = f"{card.n_frames} of {count(card.frame_count, 'frame')} in {stretches}"
    table = make_table(
        f"{card.package}: {frames}, {card.runtime} on {card.device}, {card.blend} blend",
        *("score", "value", "source's own", "good is", "verdict", "remarks"),
        right=("value", "source's own"),
    )
    for score in card.scores:
        value = "" if score.value is None else shown(score, score.value)
        own = shown(score, score.criterion.source)
        add_row(table, score.criterion.title, value, own, str(score.criterion), VERDICTS[score.good], score.note)
    console.print(table)
    console.print(how_openings_were_read(card), soft_wrap=True, markup=False)


def how_openings_were_read(card: QualityCard) -> str:
    if card.opening_from == "landmarks":
        return (
            f"openings: read from pixels, fitted to the package's landmarks; r² {card.opening_r2:.3f} on unseen frames"
        )
    if card.opening_from == "motion":
        return "openings: the main motion of the mouth's pixels, for landmarks are missing or do not explain them"
    return "openings: not read"


def shown(score: Score, value: float) -> str:
    """A value with its unit: "30.3 dB"."""
    unit = f" {score.criterion.unit}" if score.criterion.unit else ""
    if math.isinf(value):
        return "equal"
    if score.name == "lag":
        return f"{value:+.0f}{unit}" if value else f"0{unit}"
    return f"{value:.1f}{unit}" if unit == " dB" else f"{value:.2f}{unit}"


def describe(folder: Path, card: QualityCard) -> dict[str, Any]:
    """The same for programs. Limits and values that are infinite are null."""
    described = asdict(card)
    described["scores"] = {
        score.name: {
            "value": _finite(score.value),
            "unit": score.criterion.unit,
            "source": _finite(score.criterion.source),
            "low": _finite(score.criterion.low),
            "high": _finite(score.criterion.high),
            "good": score.good,
            "why": score.criterion.why,
            "note": score.note,
        }
        for score in card.scores
    }
    return {"path": str(folder), "good": card.good, **described}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
