#!/bin/sh
# The other makers' programs that `make test-abuse` tries the server with: `tools/setup_abuse.sh [VENV]`, .venv by default.
#
# On Debian as root they are installed, elsewhere the line that installs them is printed. Whatever is missing in the end
# is no error: the rows that need it are written down as not run.
set -eu
cd "$(dirname "$0")/.."
VENV=${1:-.venv}
TOOLS=abuse
PATH=$PATH:/usr/sbin
mkdir -p "$TOOLS"

sh tools/setup_nginx.sh
missing=""
command -v h2load >/dev/null || missing="$missing nghttp2-client"
command -v npm >/dev/null || missing="$missing nodejs npm"
if [ -n "$missing" ]; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "setup: installing$missing"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >&2 ||
            echo "setup: could not be installed:$missing" >&2
    else
        echo "setup: missing$missing; on Debian: sudo apt-get install -y$missing" >&2
    fi
fi

if [ ! -d "$TOOLS/node_modules/@grpc/grpc-js" ] && command -v npm >/dev/null; then
    npm install --silent --no-fund --no-audit --no-package-lock --prefix "$TOOLS" \
        @grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1 >&2 || echo "setup: @grpc/grpc-js could not be installed" >&2
fi

# The transport is tried on each of these, with a fake engine: a few small libraries are enough.
for version in 3.11 3.12 3.13; do
    folder=$TOOLS/python$version
    [ ! -x "$folder/bin/python" ] || continue
    found=""
    for python in "$VENV/bin/python" "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$version.*/bin/python; do
        if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "setup: no Python $version is here; the transport is not tried on it" >&2
    elif [ "$found" != "$VENV/bin/python" ]; then
        echo "setup: an environment of Python $version"
        "$found" -m venv "$folder" && "$folder/bin/python" -m pip --disable-pip-version-check install --quiet \
            --constraint constraints.txt betterproto grpclib h2 protobuf ||
            { echo "setup: Python $version could not be set up" >&2; rm -rf "$folder"; }
    fi
done
