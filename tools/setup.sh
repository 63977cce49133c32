#!/bin/sh
# Build the virtual environment: `tools/setup.sh [FOLDER]`, .venv by default. `make` calls this.
#
# Pillow-SIMD compiles from source, so a C compiler and the headers of libjpeg, zlib and Python are checked for first:
# on Debian as root they are installed, elsewhere the line that installs them is printed.
set -eu
cd "$(dirname "$0")/.."
VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: Python 3.11 or newer is needed ($PYTHON is not); name one with: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# "python3", or "python3.12" if that one was named: Debian's packages are called after it.
debian_python=$(basename "$PYTHON")

missing=""
command -v gcc >/dev/null 2>&1 || missing="$missing gcc"
has_header() { printf '#include <stdio.h>\n#include <%s>\n' "$1" | gcc ${2:-} -E - >/dev/null 2>&1; }
if command -v gcc >/dev/null 2>&1; then
    has_header jpeglib.h || missing="$missing libjpeg-dev"
    has_header zlib.h || missing="$missing zlib1g-dev"
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    has_header Python.h "-I$include" || missing="$missing $debian_python-dev"
else
    missing="$missing libc6-dev libjpeg-dev zlib1g-dev $debian_python-dev"
fi
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing $debian_python-venv"
if [ -n "$missing" ]; then
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        echo "setup: installing$missing"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >&2
    elif command -v apt-get >/dev/null 2>&1; then
        echo "setup: missing$missing. Install them, then run make again:" >&2
        echo "    sudo apt-get install -y$missing" >&2
        exit 1
    else
        echo "setup: missing a C compiler, or the headers of libjpeg-turbo, zlib or Python (Debian calls them$missing);" >&2
        echo "install what this system calls them, then run make again" >&2
        exit 1
    fi
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
echo "setup: installing into $VENV (the first time takes a few minutes)"
# The build back ends come first and pinned, and builds use them: otherwise each build would fetch the newest.
pip install --quiet --constraint constraints.txt setuptools wheel pybind11 hatchling editables
pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
"$VENV/bin/python" tools/check_pillow.py
