#!/bin/sh
# Fetch HateMM: ./data_download.sh [DIR] [options of `hatemm fetch`, such as --accept-licence]
# DIR is data/hatemm when it is not given. A broken download goes on where it stopped: run it again.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$here/.venv/bin/hatemm" ]; then
    hatemm=$here/.venv/bin/hatemm
elif ! hatemm=$(command -v hatemm); then
    echo "data_download.sh: no hatemm command in $here/.venv/bin nor on PATH; install the package first: python -m venv .venv && .venv/bin/pip install -e ." >&2
    exit 1
fi

dir=data/hatemm
case ${1-} in
    '' | -*) ;;
    *) dir=$1; shift ;;
esac
exec "$hatemm" fetch hatemm "$dir" "$@"
