#!/bin/sh
# The steps of the image, each of which runs without Docker, too:
#   sh docker/image.sh install DIR [OPTIONS OF UV]   a small installation for the CPU
#   sh docker/image.sh check DIR BUNDLE              serve a bundle from it as the container does
set -eu
step=$1 prefix=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
python=$prefix/bin/python

install() {
    "${PYTHON:-python3}" -m venv "$prefix"
    "$python" -m pip install --quiet --no-cache-dir uv
    # PyTorch for the CPU is 2.5 GB smaller than that for CUDA, which PyPI has.
    UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-cpu} "$prefix/bin/uv" pip install --quiet --no-cache --compile-bytecode \
        --python "$python" "$@" "$here[serve]"
    # 1 GB that openai-whisper asks for, and uses on GPUs alone.
    "$prefix/bin/uv" pip uninstall --quiet --python "$python" triton 2>/dev/null || true
}

check() {
    bundle=$1 port=${PORT:-5055}
    "$prefix/bin/hatemm" --version
    mkdir -p "${TMPDIR:-/tmp}/jobs"
    "$prefix/bin/hatemm" serve "$bundle" --host 127.0.0.1 --port "$port" --jobs-dir "${TMPDIR:-/tmp}/jobs" &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    tries=0
    until PORT=$port "$python" "$here/docker/health.py" readyz 2>/dev/null; do
        tries=$((tries + 1))
        if [ $tries -gt 240 ] || ! kill -0 $server 2>/dev/null; then echo 'the server did not become ready' >&2; exit 1; fi
        sleep .5
    done
    PORT=$port "$python" "$here/docker/health.py" model
    kill -TERM $server
    wait $server  # its exit status is that of the check
}

"$step" "$@"
