"""What package.json says beside its files: every key is optional, and what is read is held against the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipsync.engine.faults import Fault, brief, listing

FPS_TOLERANCE = 0.01

Ranges = tuple[tuple[int, int], ...]


def parse_idle(data: object, frame_count: int | None) -> Ranges:
    """Stretches of a video in which the person is silent with a closed mouth.

    Args:
        data: `[[first, end], ...]` in frames, ends exclusive, in order, without overlap; None if there are none.
        frame_count: of the video, None if it is not known.
    Raises Fault if it is something else, or leaves the video.
    """
    if data is None:
        return ()
    expected = "[[first, end], ...]: frames in order, each range at least 1 long, ends exclusive"
    if not isinstance(data, list):
        raise Fault(f'"idle" is {brief(data)}', expected)
    odd = [brief(item) for item in data if not _is_range(item)]
    if odd:
        raise Fault(f'"idle" has {listing(odd)}', expected)
    for before, after in zip(data, data[1:], strict=False):
        if after[0] < before[1]:
            raise Fault(f'"idle" has {brief(after)} after {brief(before)}', "ranges in order that do not overlap")
    if frame_count is not None and data and data[-1][1] > frame_count:
        raise Fault(f'"idle" has {brief(data[-1])}', f"ranges inside of the video's {frame_count} frames")
    return tuple((first, end) for first, end in data)


def _is_range(item: object) -> bool:
    whole = isinstance(item, list) and len(item) == 2 and all(_is_whole(n) for n in item)
    return whole and isinstance(item, list) and 0 <= item[0] < item[1]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_claims(manifest: Mapping[str, Any], facts: Mapping[str, object]) -> list[Fault]:
    """What a manifest says otherwise than its files do.

    Args:
        manifest: package.json's object.
        facts: what the files say, by the manifest's key; a mapping for a key that holds an object. Keys that the
            manifest does not have are not looked at, nor are those of the manifest that are not among the facts.
    """
    faults = []
    for key, fact in facts.items():
        if key not in manifest:
            continue
        claim = manifest[key]
        if isinstance(fact, Mapping):
            if not isinstance(claim, dict):
                faults.append(Fault(f'"{key}" is {brief(claim)}', "an object"))
                continue
            faults += [
                Fault(f'"{key}.{part}" is {brief(claim[part])}', f"{brief(value)}, as its files have it")
                for part, value in fact.items()
                if part in claim and not _same(claim[part], value)
            ]
        elif not _same(claim, fact):
            faults.append(Fault(f'"{key}" is {brief(claim)}', f"{brief(fact)}, as its files have it"))
    return faults


def _same(claim: object, fact: object) -> bool:
    if isinstance(fact, float):
        return isinstance(claim, (int, float)) and not isinstance(claim, bool) and abs(claim - fact) <= FPS_TOLERANCE
    return not isinstance(claim, bool) and claim == fact
