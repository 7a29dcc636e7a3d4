#!/usr/bin/env bash
# tools/matrix.sh [VERSION ...]: the core's tests on several torch versions, each in a virtual environment of its own
# (.venv-torch-VERSION, kept). "newest" is what pip finds. torch's private APIs, all in aliasparam/torch_private.py, are why.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ $# -gt 0 ] || set -- 2.8.0 2.11.0 2.13.0 newest
failed=0
for version; do
  venv=.venv-torch-$version
  pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
  if [ ! -e "$venv/.made" ]; then
    { $python -m venv "$venv" && $pip --upgrade pip && $pip "torch$([ "$version" = newest ] || echo "==$version")" \
      && $pip safetensors rich typer hypothesis pytest pytest-xdist zstandard xxhash blake3 numpy \
      && $pip --no-deps -e . && touch "$venv/.made"; } || { echo "torch $version: cannot be installed"; failed=1; continue; }
  fi
  found=$("$venv/bin/python" -c 'import torch; print(torch.__version__)')
  if out=$(OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci "$venv/bin/python" -m pytest -q -n "${JOBS:-2}" \
      --ignore=tests/aliasparam/test_docs_are_exact.py tests/aliasparam 2>&1); then
    echo "torch $found: $(tail -1 <<<"$out")"
  else
    echo "$out" | tail -40; echo "torch $found: failed"; failed=1
  fi
done
exit $failed
