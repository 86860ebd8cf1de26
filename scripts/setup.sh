# Sourced by scripts/quickstart and scripts/test: the active virtual environment, or .venv made here, with qzo installed.
# Usage: . scripts/setup.sh [EXTRA]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python="${PYTHON:-python3}"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "qzo needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=... to another." >&2
            exit 2
        }
        echo "making .venv" >&2
        "$python" -m venv .venv
    fi
    . .venv/bin/activate
fi
wanted="qzo${1:+[$1]} $(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
stamp="$VIRTUAL_ENV/.qzo-installed-${1:-core}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing (a few minutes the first time)" >&2
    if ! python -c 'import torch' 2>/dev/null; then
        python -m pip install -q --disable-pip-version-check -c constraints.txt torch
    fi
    python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
    echo "$wanted" > "$stamp"
fi
