# Sourced by the scripts beside it: one virtual environment, made where there is none.
# PYTHON chooses the interpreter (3.11 or newer), VENV the place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

stamp=$VENV/.installed
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  python=${PYTHON:-$(command -v python3.11 || command -v python3 || echo python3)}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 2
  }
  echo "setting up $VENV (once, some minutes) ..." >&2
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  extra=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then extra=cuda; fi
  "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e ".[$extra,dev]" >&2
  touch "$stamp"
fi
export PATH="$VENV/bin:$PATH"
