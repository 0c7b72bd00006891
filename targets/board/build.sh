#!/bin/sh
# Build the engines of this bundle on this board; arguments go to build_engine.py (./build.sh --help).
# The system python has TensorRT's bindings on a Jetson; PYTHON=... takes another one.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    echo "build.sh: $python is missing or older than Python 3.8; JetPack 5.1 and later have it" >&2
    exit 1
fi
exec "$python" "$here/build_engine.py" "$@"
