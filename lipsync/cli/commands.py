"""The commands and their options. What they do is in the modules beside this one, imported when they are called."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from lipsync import __version__
from lipsync.cli.settings import load_settings, setting_options
from lipsync.cli.stopping import Terminated, Termination

DEFAULT_ADDRESS = "localhost:50051"
FOLDER = click.Path(path_type=Path)
STOPPED_GENTLY = ("serve", "demo")
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
@setting_options
@pass_termination
def serve(termination: Termination, /, config_file: Path | None, **options: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    With --models, every package in that folder is loaded, or those that --load names. Without either, the demo model
    is served, built first if need be.

    Every option is also a variable (LIPSYNC_PORT=50052) and a line of the settings file (port = 50052). Options win
    over variables, variables over the file. Of --load, which may be given more than once, the variable separates names
    by commas (LIPSYNC_LOAD=anna,ben), and the file has a list (load = ["anna", "ben"]).
    """
    engine_config, server_config = load_settings(config_file, options)
    with contextlib.suppress(Terminated):  # how a server is meant to end, however early: no error
        from lipsync.cli.serve import find_packages, run_server
        from lipsync.engine.runtime import resolve_device

        termination.check()
        resolve_device(engine_config.device)  # said before the demo package is built, if that is to come
        server_config, packages = find_packages(server_config, termination)
        asyncio.run(run_server(engine_config, server_config, packages, termination))
    print("stopped")


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
def check(address: str, model: str | None, save: Path, timeout_s: float) -> None:
    """Try a running server: every call once, as a table.

    Exit code 1 if anything failed.
    """
    from lipsync.cli.check import check_server

    sys.exit(0 if asyncio.run(check_server(address, model=model, save=save, timeout_s=timeout_s)) else 1)


@cli.group()
def package() -> None:
    """Model packages: one folder a person."""


@package.command()
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object; problems are listed in it.")
def inspect(folder: Path, as_json: bool) -> None:
    """What is in a package, and everything that is wrong with it.

    Exit code 1 if it cannot be used.
    """
    from lipsync.cli.inspect import inspect_package

    sys.exit(0 if inspect_package(folder, as_json=as_json) else 1)


@cli.command()
@click.option(
    "--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder for the video and the pictures."
)
@click.option("--package-only", is_flag=True, help="Build the demo package, say where it is, and stop.")
@click.option("--package", "folder", type=FOLDER, help="Build it there instead of in the user's cache folder.")
@pass_termination
def demo(termination: Termination, /, out: Path, package_only: bool, folder: Path | None) -> None:
    """See a face talk: build the demo package, serve it, ask for its frames, write a video.

    Writes demo.mp4, frame.jpg and mouths.jpg (twelve mouths with their times) into the output folder.
    """
    from lipsync.cli.demo import build_package, run_demo

    termination.check()
    built = build_package(folder, termination)
    if package_only:
        print(built)
        return
    sys.exit(0 if asyncio.run(run_demo(out, built, termination)) else 1)


@cli.command()
@click.option("--quick", is_flag=True, help="The ratios alone, in under a minute.")
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
        run_bench(out, packages_folder=folder, quick=quick, seconds=seconds, device=device)


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
