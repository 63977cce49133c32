"""The commands and their options. What they do is in the modules beside this one, imported when they are called."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from lipsync import __version__
from lipsync.cli.connecting import Connection, connection_options
from lipsync.cli.settings import load_settings, setting_options, setting_origins
from lipsync.cli.stopping import Terminated, Termination

DEFAULT_ADDRESS = "localhost:50051"
FOLDER = click.Path(path_type=Path)
STOPPED_GENTLY = ("serve", "demo", "package", "render")
PACKAGE_STOPPED_GENTLY = ("build",)
"""The commands that look at SIGTERM themselves."""
pass_termination = click.make_pass_decorator(Termination, ensure=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lipsync", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Lip-synced frames of prepared people, in real time.

    \b
    See it:             lipsync demo
    Serve it:           lipsync serve                    (the demo model, on localhost:50051)
                        lipsync serve --models packages/
    Try a server:       lipsync check localhost:50051
    Make a video:       lipsync render packages/anna speech.wav -o out.mp4
    Make a package:     lipsync package build dataset/anna -o packages/anna
    Look at a package:  lipsync package inspect packages/anna
    If anything fails:  lipsync doctor
    """
    if context.invoked_subcommand not in STOPPED_GENTLY:
        context.ensure_object(Termination).release()


@cli.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="LIPSYNC_CONFIG",
    help="A TOML file of settings, named as the options are: port = 50051",
)
@click.option(
    "--check-config", is_flag=True, help="Show every setting, look at the files that they name, and serve nothing."
)
@setting_options
@pass_termination
def serve(termination: Termination, /, config_file: Path | None, check_config: bool, **options: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    With --models, every package in that folder is loaded, or those that --load names. Without either, the demo model
    is served, built first if need be.

    Every option is also a variable (LIPSYNC_PORT=50052) and a line of the settings file (port = 50052). Options win
    over variables, variables over the file. Of --load, which may be given more than once, the variable separates names
    by commas (LIPSYNC_LOAD=anna,ben), and the file has a list (load = ["anna", "ben"]).

    SIGHUP has certificates and tokens read again at once; within seconds that happens by itself. Exit code 1 of
    --check-config: something is wrong.
    """
    engine_config, server_config, cluster_config = load_settings(config_file, options)
    if check_config:
        from lipsync.cli.check_config import check_config as run_check_config

        origins = setting_origins(config_file, options)
        sys.exit(0 if run_check_config(engine_config, server_config, cluster_config, origins) else 1)
    drained = True
    with contextlib.suppress(Terminated):  # how a server is meant to end, however early: no error
        termination.check()
        if cluster_config.workers > 1:
            from lipsync.cli.worker_process import run_local
            from lipsync.cli.workers import run_workers

            run = partial(run_local, engine_config)
            if cluster_config.backend == "ray":
                from lipsync.cli.serve_ray import run_ray_worker

                run = partial(run_ray_worker, engine_config, cluster_config)
            drained = run_workers(run, cluster_config.workers, server_config, termination)
        elif cluster_config.backend == "ray":
            from lipsync.cli.serve import find_packages
            from lipsync.cli.serve_ray import run_ray_server
            from lipsync.transport.security import Security

            Security.of(server_config)
            server_config, packages = find_packages(server_config, termination)
            asyncio.run(run_ray_server(engine_config, server_config, cluster_config, packages, termination))
        else:
            from lipsync.cli.serve import find_packages, run_server
            from lipsync.engine.runtime import resolve_device
            from lipsync.transport.security import Security

            termination.check()
            # said before packages are loaded, and that of the demo is built
            Security.of(server_config)
            resolve_device(engine_config.device)
            server_config, packages = find_packages(server_config, termination)
            asyncio.run(run_server(engine_config, server_config, packages, termination))
    print("stopped")
    if not drained:
        sys.exit(1)


@cli.command()
@click.argument("address", default=DEFAULT_ADDRESS, envvar="LIPSYNC_ADDRESS")
@click.option("--model", help="The model to ask for; the first that the server lists by default.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("frame.jpg"),
    show_default=True,
    help="Where the first frame goes.",
)
@click.option("--timeout", "timeout_s", type=float, default=30.0, show_default=True, help="Seconds for each call.")
@connection_options
def check(address: str, model: str | None, save: Path, timeout_s: float, connection: Connection) -> None:
    """Try a running server: every call once, as a table.

    Exit code 1 if anything failed.
    """
    from lipsync.cli.check import check_server

    client = connection.client(address, timeout_s=timeout_s)
    sys.exit(0 if asyncio.run(check_server(client, model=model, save=save)) else 1)


@cli.group()
def token() -> None:
    """Tokens that a server asks its callers for."""


@token.command("new")
@click.option("--name", required=True, help="Who shows it, for the server's log: A-Z a-z 0-9 . _ -")
@click.option(
    "--role",
    "roles",
    required=True,
    multiple=True,
    help="infer: frames, streams and what there is; admin: everything, loading included; metrics. May be repeated.",
)
def new_token(name: str, roles: tuple[str, ...]) -> None:
    """Make a token: itself, and its line for the file that `lipsync serve --tokens` reads.

    \b
    Add one:            lipsync token new --name anna --role infer >> tokens    (then chmod 600 tokens)
    """
    from lipsync.cli.token import make_token

    make_token(name, roles)


@cli.group()
@click.pass_context
def package(context: click.Context) -> None:
    """Model packages: one folder a person.

    \b
    Make one:           lipsync package build dataset/anna -o packages/anna
    Look at it:         lipsync package inspect packages/anna
    Check all of it:    lipsync package validate packages/anna
    See how good it is: lipsync package score packages/anna
    """
    if context.invoked_subcommand not in PACKAGE_STOPPED_GENTLY:
        context.ensure_object(Termination).release()


def frame_range(context: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """A:B, frames from A up to but without B."""
    return None if value is None else _range(value)


def frame_ranges(context: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The same, given more than once; in order."""
    return tuple(sorted(_range(each) for each in value))


def _range(value: str) -> tuple[int, int]:
    first, colon, end = value.partition(":")
    if not (colon and first.isascii() and first.isdigit() and end.isascii() and end.isdigit()):
        raise click.BadParameter(f"{value!r} is no range; write two frame numbers: 0:250")
    if int(first) >= int(end):
        raise click.BadParameter(f"{value!r} is empty; the second number is the first frame that is left out")
    return int(first), int(end)


FILE = click.Path(path_type=Path)


@package.command()
@click.argument("source", type=FILE)
@click.option("-o", "--out", "target", type=FOLDER, help="The package's folder.")
@click.option("--name", help="The person's name; the source's own by default.")
@click.option("--landmarks", type=FILE, metavar="DIR", help="The folder of .lms files.")
@click.option("--features", type=FILE, metavar="FILE", help="The audio features: aud_ave.npy, aud_hu.npy or so.")
@click.option("--audio", type=FILE, metavar="FILE", help="The recording that goes with the frames.")
@click.option("--checkpoint", type=FILE, metavar="FILE|DIR", help="The network, or a folder of epochs.")
@click.option("--audio-encoder", type=FILE, metavar="FILE", help="For live audio: audio_visual_encoder.pth.")
@click.option("--frames", callback=frame_range, metavar="A:B", help="Only these of the source's frames, B left out.")
@click.option(
    "--idle",
    callback=frame_ranges,
    metavar="A:B",
    multiple=True,
    help="The person rests in these frames of the package.",
)
@click.option("--no-idle", is_flag=True, help="Mark no idle frames.")
@click.option(
    "--certificate", type=click.IntRange(0, 1000), default=8, show_default=True, help="Frames that it measures."
)
@click.option(
    "--crf",
    type=click.IntRange(0, 40),
    default=18,
    show_default=True,
    help="x264's rate factor of the whole frames; face crops are nearly lossless.",
)
@click.option("--strict", is_flag=True, help="Refuse what would be made good: whatever the report warns of.")
@click.option("--dry-run", is_flag=True, help="The report alone; nothing is written.")
@click.option("--force", is_flag=True, help="Build again what is built, and replace whatever is at the target.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object with the report.")
@pass_termination
def build(
    termination: Termination,
    /,
    source: Path,
    target: Path | None,
    name: str | None,
    landmarks: Path | None,
    features: Path | None,
    audio: Path | None,
    checkpoint: Path | None,
    audio_encoder: Path | None,
    frames: tuple[int, int] | None,
    idle: tuple[tuple[int, int], ...],
    no_idle: bool,
    certificate: int,
    crf: int,
    strict: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make a package of SOURCE: what training leaves, an older package, or a video with landmarks.

    A training folder holds full_body_img/, landmarks/, aud_ave.npy (or aud_hu.npy, aud_wenet.npy), aud.wav and
    checkpoint/. What is found in it is told first, with what is done about it. An interrupted build goes on when the
    same command is given again. Exit code 1 if the source is refused.
    """
    if target is None and not dry_run:
        raise click.UsageError("say where the package goes with -o DIR, or give --dry-run")
    if no_idle and idle:
        raise click.UsageError("--idle and --no-idle contradict each other")
    from lipsync.cli.build import run_build
    from lipsync.making.source import SourceOptions

    termination.check()
    options = SourceOptions(
        name=name,
        landmarks=landmarks,
        features=features,
        audio=audio,
        checkpoint=checkpoint,
        audio_encoder=audio_encoder,
        frames=frames,
        idle=idle if idle or no_idle else None,
        certificate_frames=certificate,
        background_crf=crf,
    )
    done = run_build(source, target, options, termination, strict=strict, force=force, dry_run=dry_run, as_json=as_json)
    sys.exit(0 if done else 1)


@package.command()
@click.argument("folder", type=FOLDER)
@click.option("--quick", is_flag=True, help="Without hashes, and without decoding the videos to their ends.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object with every check.")
def validate(folder: Path, quick: bool, as_json: bool) -> None:
    """Check a package in every way: what loading looks at, hashes, all frames, the recording, the certificate.

    Exit code 1 if anything is wrong.
    """
    from lipsync.cli.validate import run_validate

    sys.exit(0 if run_validate(folder, quick=quick, as_json=as_json) else 1)


@package.command()
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object; problems are listed in it.")
def inspect(folder: Path, as_json: bool) -> None:
    """What is in a package, and everything that is wrong with it.

    Exit code 1 if it cannot be used.
    """
    from lipsync.cli.inspect import inspect_package

    sys.exit(0 if inspect_package(folder, as_json=as_json) else 1)


@package.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--frames",
    "n_frames",
    type=click.IntRange(min=1),
    default=150,
    show_default=True,
    help="Frames to score, in stretches of neighbours; all of a shorter video.",
)
@click.option("--device", default="auto", show_default=True, help="Where the network runs: auto, cpu, cuda or cuda:N.")
@click.option("--runtime", default="auto", show_default=True, help="How it runs, as with lipsync serve.")
@click.option("--blend", help="How faces meet the frame: hard, feather or matched; what is served by default.")
@click.option("--strict", is_flag=True, help="Exit code 1 if a score is outside of its limits.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object with every score and its limits.")
def score(
    folder: Path, n_frames: int, device: str, runtime: str, blend: str | None, strict: bool, as_json: bool
) -> None:
    """How good a package's frames are: its network speaks, and the frames are held against the source video.

    Likeness, timing of the lips, whether they follow the audio, rest in silence, seam and jitter.
    """
    from lipsync.cli.score import run_score
    from lipsync.config import EngineConfig

    good = run_score(
        folder,
        n_frames=n_frames,
        device=device,
        runtime=runtime,
        blend=EngineConfig.blend if blend is None else blend,
        as_json=as_json,
    )
    sys.exit(1 if strict and not good else 0)


@cli.command()
@click.argument("model", metavar="PACKAGE")
@click.argument("audio", type=FILE)
@click.option("-o", "--out", "target", type=FILE, required=True, metavar="OUT.mp4", help="The video.")
@click.option("--address", metavar="HOST:PORT", help="Have a server make the frames; PACKAGE is one of its models.")
@click.option(
    "--quality",
    "--crf",
    "crf",
    type=click.IntRange(0, 51),
    default=18,
    show_default=True,
    metavar="CRF",
    help="x264's rate factor, 0 to 51; less is finer, and 18 looks like the original.",
)
@click.option(
    "--start-frame",
    type=int,
    default=0,
    show_default=True,
    help="The person's video begins at this frame; it runs to its end and back.",
)
@click.option(
    "--rest-after",
    "rest_after_s",
    type=float,
    metavar="SECONDS",
    help="How long it must be quiet before the mouth rests.  [default: 0.6]",
)
@click.option("--never-rest", is_flag=True, help="The network moves the mouth in silence too.")
@click.option(
    "--quiet",
    "quiet_dbfs",
    type=float,
    default=-45.0,
    show_default=True,
    metavar="DB",
    help="Up to which level it is quiet, in dB of full scale.",
)
@click.option(
    "--look-ahead",
    "look_ahead_ms",
    type=float,
    metavar="MS",
    help="As live audio would look if frames waited for this little audio; all that helps by default.",
)
@click.option("--device", help="Where the network runs: auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--runtime", help="How it runs, as with lipsync serve.  [default: auto]")
@click.option("--blend", help="How faces meet the frame: hard, feather or matched, as with lipsync serve.")
@click.option("--audio-encoder", metavar="FILE", help="For a package that has none of its own.")
@connection_options
@pass_termination
def render(
    termination: Termination,
    /,
    model: str,
    audio: Path,
    target: Path,
    address: str | None,
    crf: int,
    start_frame: int,
    rest_after_s: float | None,
    never_rest: bool,
    quiet_dbfs: float,
    look_ahead_ms: float | None,
    connection: Connection,
    **engine: str | None,
) -> None:
    """Make a video of a person who says a recording: PACKAGE and AUDIO in, MP4 out.

    PACKAGE is a package's folder, or with --address the name of a model that the server has loaded. AUDIO is any file
    that FFmpeg reads: WAV, MP3, M4A. The video has its sound, and is as long. What is at OUT.mp4 already stays until
    the new video is whole.
    """
    given = ["--" + name.replace("_", "-") for name, value in engine.items() if value is not None]
    if address is not None and given:
        raise click.UsageError(f"with --address, {given[0]} is the server's own matter: give it to lipsync serve")
    if never_rest and rest_after_s is not None:
        raise click.UsageError("--rest-after and --never-rest contradict each other")
    client = None if address is None else connection.client(address)
    from lipsync.cli.render import JPEG_QUALITY, run_render, speech_options
    from lipsync.types import SpeechOptions

    termination.check()
    speech = speech_options(
        start_frame=start_frame,
        rest_after_s=None if never_rest else SpeechOptions.rest_after_s if rest_after_s is None else rest_after_s,
        quiet_dbfs=quiet_dbfs,
        look_ahead_ms=look_ahead_ms,
    )
    # one quality, so that whole frames are prepared once; and no frame is asked for twice
    config, *_ = load_settings(None, {**engine, "jpeg_quality": JPEG_QUALITY, "result_cache_mb": 0})
    asyncio.run(
        run_render(model, audio, target, client=client, speech=speech, engine=config, crf=crf, termination=termination)
    )


@cli.command()
@click.option(
    "--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for the video and the pictures."
)
@click.option("--package-only", is_flag=True, help="Build the demo package, say where it is, and stop.")
@click.option("--web", is_flag=True, help="Serve it to a browser, and open that, until Ctrl-C. Writes nothing.")
@click.option("--package", "folder", type=FOLDER, help="Build it there instead of in the user's cache folder.")
@pass_termination
def demo(termination: Termination, /, out: Path, package_only: bool, web: bool, folder: Path | None) -> None:
    """See a face talk: build the demo package, serve it, ask for its frames, write a video.

    Writes demo.mp4, frame.jpg and mouths.jpg (twelve mouths with their times) into the output folder. With --web, a
    page in the browser instead, where it speaks what a microphone hears.
    """
    from lipsync.cli.demo import build_package, run_demo

    termination.check()
    built = build_package(folder, termination)
    if package_only:
        print(built)
        return
    if web:
        from lipsync.cli.demo_page import run_page

        with contextlib.suppress(Terminated):
            asyncio.run(run_page(built, termination))
        return
    sys.exit(0 if asyncio.run(run_demo(out, built, termination)) else 1)


@cli.command()
@click.option("--quick", is_flag=True, help="The ratios alone, in under a minute.")
@click.option("--websocket", "only_web", is_flag=True, help="The WebSockets beside gRPC alone, in six minutes.")
@click.option("--seconds", type=float, help="For how long strict streams have to be smooth: 60, or 0 with --quick.")
@click.option(
    "--out", type=FOLDER, default=Path("bench"), show_default=True, help="Folder for results.json and the charts."
)
@click.option("--device", default="auto", show_default=True, help="Where our network runs: auto, cpu, cuda or cuda:N.")
@click.option(
    "--packages", "folder", type=FOLDER, help="Measure with the packages in this folder, made by --make-package."
)
@click.option(
    "--make-package",
    "make_folder",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Build the packages, there or in the user's cache folder, say where they are, and stop.",
)
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Measure nothing: write --docs."
)
@click.option(
    "--docs", type=FOLDER, default=Path("docs"), show_default=True, help="Where --report writes performance.md."
)
def bench(
    quick: bool,
    only_web: bool,
    seconds: float | None,
    out: Path,
    device: str,
    folder: Path | None,
    make_folder: str | None,
    report: Path | None,
    docs: Path,
) -> None:
    """Measure this engine beside the design that it replaces, in one run.

    Shows tables, and writes results.json with every sample, and charts. What the reference design needs (grpcio,
    OpenCV) and what else is compared (ONNX Runtime) is left out where it is not installed. Takes about half an hour on
    two cores; nothing else should run meanwhile.
    """
    from lipsync.cli.bench import build_packages, run_bench, write_docs

    if report is not None:
        write_docs(report, docs)
    elif make_folder is not None:
        print(build_packages(Path(make_folder) if make_folder else None).folder)
    else:
        run_bench(out, packages_folder=folder, quick=quick, seconds=seconds, device=device, only_web=only_web)


@cli.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=50051, show_default=True, help="The port that should be free."
)
def doctor(port: int) -> None:
    """What this machine offers, what is missing, and what to do about it.

    Exit code 1 if something that is needed is missing.
    """
    from lipsync.cli.doctor import run_doctor

    sys.exit(0 if run_doctor(port) else 1)


SHARE = click.FloatRange(0, 1)
POSITIVE = click.FloatRange(0, min_open=True)


@cli.command()
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("bench/results.json"),
    show_default=True,
    help="What lipsync bench measured, on a machine like those to come.",
)
@click.option("--people", type=click.IntRange(min=1), required=True, help="Models that there are.")
@click.option("--streams", type=click.IntRange(min=1), required=True, help="Streams at a time.")
@click.option("--fps", type=POSITIVE, default=25.0, show_default=True, help="Frames a second of a stream.")
@click.option(
    "--speaking", type=SHARE, default=0.6, show_default=True, help="Share of a stream in which the person speaks."
)
@click.option("--frames", "n_frames", type=click.IntRange(min=1), help="Of a person's video; those that were measured.")
@click.option("--resident", type=SHARE, default=1.0, show_default=True, help="Share of the people kept in memory.")
@click.option("--zipf", type=click.FloatRange(0), default=1.0, show_default=True, help="How unequal popularity is.")
@click.option(
    "--copies", type=click.IntRange(min=1), default=1, show_default=True, help="Of who is in memory, at least."
)
@click.option("--use", type=SHARE, default=0.7, show_default=True, help="Share of GPUs and cores that is planned with.")
@click.option("--network-use", type=SHARE, default=0.7, show_default=True, help="The same of the network.")
@click.option("--memory-use", type=SHARE, default=0.9, show_default=True, help="The same of memory.")
@click.option("--spare", type=click.IntRange(min=0), default=1, show_default=True, help="Machines that may fail.")
@click.option("--cores", type=click.IntRange(min=1), required=True, help="Of a machine.")
@click.option("--memory-gb", type=POSITIVE, required=True, help="Of a machine.")
@click.option("--network-gbits", type=POSITIVE, default=10.0, show_default=True, help="Of a machine, each way.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Of a machine.")
@click.option("--gpu-memory-gb", type=click.FloatRange(0), default=0.0, help="Of each GPU.")
@click.option("--price", "price_per_hour", type=click.FloatRange(0), help="Of a machine, for an hour.")
@click.option("--network-ms", type=POSITIVE, help="Instead of what was measured: of a GPU, or of a core, a frame.")
@click.option("--finish-ms", type=POSITIVE, help="The same, of a core, to composite and encode a frame.")
@click.option("--transport-ms", type=POSITIVE, help="The same, to send it.")
@click.option("--hear-ms", type=POSITIVE, help="The same, to hear its audio.")
@click.option("--frame-bytes", type=POSITIVE, help="The same, of its JPEG.")
@click.option("--model-mb", type=POSITIVE, help="The same, of memory for a model.")
@click.option("--gpu-model-mb", type=POSITIVE, help="The same, of a GPU's memory.")
@click.option("--process-mb", type=POSITIVE, help="The same, of memory for a replica without models.")
@click.option("--load-s", type=POSITIVE, help="The same, to load a model.")
@click.option("--package-mb", type=POSITIVE, help="The same, that are read for it.")
@click.option("--simulate", "simulated", is_flag=True, help="Simulate it too: a minute for 100,000 streams.")
@click.option("--duration", "mean_s", type=POSITIVE, default=300.0, show_default=True, help="Of a stream, in seconds.")
@click.option(
    "--durations",
    type=click.Choice(["exponential", "lognormal", "fixed"]),
    default="exponential",
    show_default=True,
    help="How they are distributed.",
)
@click.option("--target-queue", type=click.IntRange(min=1), help="Simulate with this instead of the proposed setting.")
@click.option(
    "--pinned", type=click.IntRange(min=0), default=0, show_default=True, help="People who are never put out."
)
@click.option(
    "--start-up", "start_up_s", type=click.FloatRange(0), default=60.0, show_default=True, help="Of a replica."
)
@click.option(
    "--mtbf-hours", "mtbf_h", type=click.FloatRange(0), default=720.0, show_default=True, help="Of a replica."
)
@click.option("--seconds", type=POSITIVE, default=600.0, show_default=True, help="Simulated, after it has settled.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same simulation.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def capacity(
    results: Path,
    people: int,
    streams: int,
    fps: float,
    speaking: float,
    n_frames: int | None,
    resident: float,
    zipf: float,
    copies: int,
    use: float,
    network_use: float,
    memory_use: float,
    spare: int,
    cores: int,
    memory_gb: float,
    network_gbits: float,
    gpus: int,
    gpu_memory_gb: float,
    price_per_hour: float | None,
    simulated: bool,
    mean_s: float,
    durations: str,
    target_queue: int | None,
    pinned: int,
    start_up_s: float,
    mtbf_h: float,
    seconds: float,
    seed: int,
    as_json: bool,
    **given: float | None,
) -> None:
    """How many machines it takes: for so many people and streams, at the costs that lipsync bench measured.

    Says which resource decides, what is left of the others, and what was assumed. With --simulate, streams come, are
    routed, models are loaded and put out, and replicas fail, with the code that decides it in a cluster: how many
    streams wait, and how long.

    \b
    lipsync capacity --people 10000 --streams 100000 --cores 64 --memory-gb 128
    """
    from lipsync.capacity.plan import Machine, Target
    from lipsync.cli.capacity import run_capacity

    run_capacity(
        results,
        Target(
            people=people,
            streams=streams,
            fps=fps,
            speaking=speaking,
            resident=resident,
            zipf=zipf,
            copies=copies,
            use=use,
            network_use=network_use,
            memory_use=memory_use,
            spare=spare,
        ),
        Machine(
            cores=cores,
            memory_gb=memory_gb,
            network_gbits=network_gbits,
            gpus=gpus,
            gpu_memory_gb=gpu_memory_gb,
            price_per_hour=price_per_hour,
        ),
        given,
        n_frames=n_frames,
        scenario={
            "durations": durations,
            "mean_s": mean_s,
            "target_queue": target_queue,
            "pinned": pinned,
            "start_up_s": start_up_s,
            "mtbf_h": mtbf_h,
            "seconds": seconds,
            "seed": seed,
        }
        if simulated
        else None,
        as_json=as_json,
    )
