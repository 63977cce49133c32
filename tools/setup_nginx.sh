#!/bin/sh
# nginx, for the tests of deploy/nginx: `make test` calls this. Debian's nginx-light has all that they need.
#
# On Debian as root it is installed, elsewhere the line that installs it is printed, and those tests are skipped. Envoy
# comes with the extra `dev`.
set -eu
PATH=$PATH:/usr/sbin

command -v nginx >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "setup: installing nginx-light"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nginx-light; } >&2 ||
        echo "setup: nginx could not be installed; the tests of deploy/nginx are skipped" >&2
else
    echo "setup: no nginx, so the tests of deploy/nginx are skipped; on Debian: sudo apt-get install -y nginx-light" >&2
fi
