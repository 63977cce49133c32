#!/bin/sh
# Chromium, for the tests of the page: `make test` calls this.
#
# On Debian as root it is installed, elsewhere the line that installs it is printed, and those tests are skipped.
set -eu

command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "setup: installing chromium"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >&2 ||
        echo "setup: chromium could not be installed; the tests of the page are skipped" >&2
else
    echo "setup: no chromium, so the tests of the page are skipped; on Debian: sudo apt-get install -y chromium" >&2
fi
