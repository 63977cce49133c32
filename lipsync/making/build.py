"""From a source to a finished package: looked through, written into a draft, certified, put into its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lipsync.engine.audio import write_wav
from lipsync.engine.package import MANIFEST, ModelPackage
from lipsync.engine.video import DecodingStopped, StopSignal
from lipsync.making.certificate import certify
from lipsync.making.draft import Draft, built_mark, check_target, fingerprint, open_draft, publish, write_json
from lipsync.making.findings import Report
from lipsync.making.manifest import make_manifest
from lipsync.making.pictures import Progress
from lipsync.making.plan import Plan
from lipsync.making.preflight import look_through
from lipsync.making.source import Source, SourceOptions, find_source
from lipsync.making.videos import SEGMENT_FRAMES, copy_video, join_segments, segment_path, tracks_of, write_segments
from lipsync.making.weights import write_weights

NETWORK, ENCODER = "checkpoint/network.safetensors", "audio_encoder.safetensors"
RECTANGLES, SPEECH = "crop_rectangles.json", "speech.wav"
OnReport = Callable[[Source, Report], None]
"""Called with the report before anything is written."""


class BuildStopped(Exception):
    """The caller's `stop` was set before the package was complete. What is finished of it stays in its draft."""


class SourceRefused(Exception):
    """The source has errors, or warnings where those are refused. The report, which was handed out, names them."""


@dataclass(frozen=True)
class Built:
    """What became of a build.

    Attributes:
        folder: the package's.
        was_there: it was finished already, from the same source with the same options.
        resumed: parts of an interrupted build were used.
    """

    folder: Path
    was_there: bool = False
    resumed: bool = False


def preflight(
    path: Path,
    options: SourceOptions,
    *,
    strict: bool = False,
    on_report: OnReport | None = None,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
) -> Plan:
    """Look through a source without writing anything.

    Args:
        path: a training folder, a folder of images, a video, or an older package.
        strict: refuse what has to be made good, too.
        on_report: called with what was found.
        progress: called with a stage, steps done, steps in all; from any thread.
        stop: set from another thread, it ends the work.
    Raises:
        PackageError: there is no source.
        SourceRefused: it has errors.
        BuildStopped: `stop` was set.
    """
    return _looked_through(find_source(path, options), options, strict, on_report, progress, stop)


def build_package(
    path: Path,
    target: Path,
    options: SourceOptions,
    *,
    strict: bool = False,
    force: bool = False,
    on_report: OnReport | None = None,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
) -> Built:
    """Make a package. It appears at `target` when it is whole; until then it is a draft beside it.

    Args, and what else is raised, are those of `preflight`, and:
        target: the package's folder; another package there is replaced.
        force: build again what is built already, and replace whatever is at the target.
    Raises PackageError if something else is at the target; MediaError, DeviceError if the work fails.
    """
    source = find_source(path, options)
    check_target(target, [source.path, *options.paths], force=force)
    mark = fingerprint(source, options)
    if not force and built_mark(target) == mark:
        return Built(target, was_there=True)
    plan = _looked_through(source, options, strict, on_report, progress, stop)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_draft(target, mark) as draft:
            _write(plan, draft, mark, progress or (lambda stage, done, total: None), stop)
            publish(draft, target)
            return Built(target, resumed=draft.resumed)
    except DecodingStopped:
        raise BuildStopped from None


def _looked_through(
    source: Source,
    options: SourceOptions,
    strict: bool,
    on_report: OnReport | None,
    progress: Progress | None,
    stop: StopSignal | None,
) -> Plan:
    try:
        report, plan = look_through(source, options, progress=progress, stop=stop)
    except DecodingStopped:
        raise BuildStopped from None
    if on_report is not None:
        on_report(source, report)
    if plan is None or (strict and report.warnings):
        raise SourceRefused
    return plan


def _write(plan: Plan, draft: Draft, mark: str, progress: Progress, stop: StopSignal | None) -> None:
    folder = draft.package
    files = _file_names(plan)
    _write_videos(plan, draft, files, progress, stop)
    _write_parts(plan, folder, files)
    if stop is not None and stop.is_set():
        raise DecodingStopped
    progress("hashes", 0, 1)
    manifest = make_manifest(plan, files, folder, mark)
    progress("hashes", 1, 1)
    write_json(folder / MANIFEST, manifest)
    ModelPackage.open(folder, stop=stop)
    if plan.options.certificate_frames:
        n = plan.options.certificate_frames
        progress("certificate", 0, n)
        manifest["certificate"] = certify(
            plan, folder, on_frame=lambda done, total: progress("certificate", done, total), stop=stop
        )
        write_json(folder / MANIFEST, manifest)


def _file_names(plan: Plan) -> dict[str, str]:
    """What the package's files are called, by role."""
    names = {
        "full_body": "full_body.mp4",
        "crops_328": f"crops_{plan.geometry.crop_size}.mp4",
        "audio": plan.front_end.file_name,
        "rectangles": RECTANGLES,
        "network": NETWORK,
    }
    if plan.encoder_state is not None:
        names["audio_encoder"] = ENCODER
    if plan.speech is not None:
        names["speech"] = SPEECH
    return names


def _write_videos(plan: Plan, draft: Draft, files: dict[str, str], progress: Progress, stop: StopSignal | None) -> None:
    """Those that are not there yet; finished ones stay when the build is interrupted, and so do finished parts."""
    for role, path in plan.copies.items():
        copy_video(path, draft.package / files[role])
    missing = [track.role for track in tracks_of(plan) if not (draft.package / files[track.role]).exists()]
    if not missing:
        return
    n = plan.frame_count
    write_segments(plan, draft.segments, on_frame=lambda done: progress("frames", done, n), stop=stop)
    for role in missing:
        paths = [segment_path(draft.segments, role, first) for first in range(0, n, SEGMENT_FRAMES)]
        join_segments(paths, draft.package / files[role], stop)


def _write_parts(plan: Plan, folder: Path, files: dict[str, str]) -> None:
    """Everything but the videos and the manifest."""
    np.save(folder / files["audio"], plan.features)
    rectangles = {str(i): {"rect": list(ref.rectangle)} for i, ref in enumerate(plan.refs)}
    (folder / files["rectangles"]).write_text(json.dumps(rectangles) + "\n", encoding="utf-8")
    write_weights(folder / files["network"], plan.network_state)
    if plan.encoder_state is not None:
        write_weights(folder / files["audio_encoder"], plan.encoder_state)
    if plan.speech is not None:
        write_wav(folder / files["speech"], plan.speech)
