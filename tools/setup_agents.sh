#!/bin/sh
# The environment in which the adapters for voice agents are tested: `tools/setup_agents.sh [FOLDER]`, .venv-agents by
# default. `make test` calls this.
#
# LiveKit Agents and Pipecat bring Pillow, whose folder is Pillow-SIMD's in .venv: so they have an environment of their
# own, with the client alone. Where they cannot be installed that is said, and their tests are skipped.
set -eu
cd "$(dirname "$0")/.."
VENV=${1:-.venv-agents}
PYTHON=${PYTHON:-python3}
DONE=$VENV/.done

[ "$DONE" -nt constraints-agents.txt ] && [ "$DONE" -nt pyproject.toml ] && [ "$DONE" -nt tools/setup_agents.sh ] && exit 0
echo "setup: installing LiveKit Agents and Pipecat into $VENV (the first time takes a minute)"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints-agents.txt "$@"; }
if { [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"; } &&
    pip hatchling editables &&
    pip --no-build-isolation --editable '.[livekit,pipecat]' pytest pytest-asyncio; then
    touch "$DONE"
else
    [ -f "$DONE" ] || rm -rf "$VENV" # half of them would fail the tests
    echo "setup: LiveKit Agents and Pipecat could not be installed; without them, the tests of their adapters are skipped" >&2
fi
