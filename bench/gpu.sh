#!/usr/bin/env bash
# Build for this machine's GPU, test the kernels on it, measure them. One command, inside ten minutes on one GPU:
#   bash bench/gpu.sh [section ...]            (or SECTIONS="build tests int4"); --list: the sections; --help: this text
# A family is measured only if its GPU tests pass on these very sources; they are run first where they have not been.
# Without a GPU every section says what it skips, and the status is 0; a failure gives status 1.
#   OUT=folder      for rows and texts (default bench/results)       PYTHON=interpreter (default python3)
#   PEERS=folder    wheels, source archives or unpacked packages of other projects, to measure them too
#   LIMIT_<section>=seconds                                          M3_CUDA_ARCHS, MAX_JOBS: as setup.py takes them
#   STATE=folder    what is kept between runs: unpacked peers, which tests passed (default build/gpu)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-bench/results}
state=${STATE:-build/gpu} # in build/, beside setup.py's objects, and as little in git as they are
default_sections="build tests sanitize int4 peers moe spec_decode policy_loss"
declare -A limits=([build]=140 [tests]=110 [sanitize]=60 [int4]=60 [peers]=70 [moe]=45 [spec_decode]=60 [policy_loss]=55
  [fp16]=60 [crossover]=60 [long]=90 [compile]=600)
declare -A about=(
  [build]="CPU module and CUDA module for this GPU alone; python -m m3kernels"
  [tests]="pytest -m gpu, family by family"
  [sanitize]="compute-sanitizer memcheck and racecheck on one small call of every op"
  [int4]="dense INT4 products in bf16 against cuBLAS and tinygemm"
  [peers]="the same against gemlite, Humming, Marlin, which compile and tune when first run; where one can be imported"
  [moe]="INT4 experts, 128 of them, 8 a token"
  [spec_decode]="tree_verify, tree_finalize, tree_attention, tree_commit"
  [policy_loss]="the loss with both gradients, 8192 tokens x 4096 x 151936"
  [fp16]="not by default: dense INT4 products of 8192 x 8192 in fp16"
  [crossover]="not by default: every INT4 kernel by number of rows, for the table of crossovers"
  [long]="not by default: the policy loss of 16384 and 65536 tokens"
  [compile]="not by default, needs no GPU: nvcc of every .cu for M3_CUDA_ARCHS (default 80;90a;100a;120a)"
)
families="int4 spec_decode policy_loss decoder"

case "${1:-}" in
  --help | -h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
  --list)
    for section in $default_sections fp16 crossover long compile; do
      printf '%-12s %4s s  %s\n' "$section" "${limits[$section]}" "${about[$section]}"
    done
    exit 0 ;;
esac
sections=${*:-${SECTIONS:-$default_sections}}
for section in $sections; do
  if [ -z "${limits[$section]:-}" ]; then
    echo "gpu.sh: section: want names of ${!limits[*]}; got '$section'" >&2
    exit 2
  fi
done

failed=0
say() { echo "gpu.sh: $*"; }
skip() { say "$1: skipped: $2"; }
fail() { say "$1: FAILED: $2"; failed=1; }
limit() { local name="LIMIT_$1"; echo "${!name:-${limits[$1]}}"; }
bounded() { # seconds, command
  local seconds=$1
  shift
  timeout --kill-after=10 "$seconds" "$@"
}

# -- what is here -------------------------------------------------------------------------------------------------------
gpu=""
if command -v nvidia-smi >/dev/null; then
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
fi
arch_of() { # compute capability -> the target that setup.py takes
  case "$1" in
    9.0) echo 90a ;; 10.0) echo 100a ;; 10.3) echo 103a ;; 12.0) echo 120a ;; 12.1) echo 121a ;; *) echo "${1/./}" ;;
  esac
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(realpath -m "$state")/triton} # what is compiled once serves later runs
export HUMMING_CACHE_DIR=${HUMMING_CACHE_DIR:-$(realpath -m "$state")/humming}
unpack_peers() { # every wheel, archive or folder of $PEERS goes to PYTHONPATH
  local entry folder
  for entry in "$PEERS"/*; do
    folder=$entry
    case "$entry" in
      *.whl | *.tar.gz | *.zip)
        folder=$state/peers/$(basename "$entry")
        if [ ! -e "$folder/.complete" ]; then
          mkdir -p "$folder"
          "$python" - "$entry" "$folder" <<'UNPACK' || { fail peers "$entry cannot be unpacked"; continue; }
import pathlib, sys, tarfile, zipfile
source, target = sys.argv[1], pathlib.Path(sys.argv[2])
if source.endswith(".tar.gz"):
    with tarfile.open(source) as archive:
        archive.extractall(target, filter="data")
else:
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            path = pathlib.Path(archive.extract(member, target))
            if member.external_attr >> 16 & 0o111 and path.is_file():
                path.chmod(0o755)  # zipfile forgets what may be executed
(target / ".complete").touch()
UNPACK
        fi
        case "$entry" in *.tar.gz) folder=$(find "$folder" -mindepth 1 -maxdepth 1 -type d | head -n 1) ;; esac ;;
    esac
    [ -d "$folder" ] && PYTHONPATH=$PYTHONPATH:$(realpath "$folder") && say "peer: $(basename "$entry")"
    for scripts in "$folder"/*.data/scripts; do [ -d "$scripts" ] && PATH=$(realpath "$scripts"):$PATH; done
  done
  export PYTHONPATH PATH
}

digest() { # of everything that a result depends on
  find m3kernels csrc tests setup.py -name '*.so' -prune -o -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum |
    cat - <(echo "$gpu") | sha256sum | cut -c1-16
}

# -- sections -----------------------------------------------------------------------------------------------------------
build() {
  export M3_CUDA_ARCHS=${M3_CUDA_ARCHS:-$(arch_of "$capability")}
  say "build: for sm_$M3_CUDA_ARCHS"
  if ! M3_CUDA=1 bounded "$(limit build)" "$python" setup.py -q build_ext --inplace >"$out/gpu_build.txt" 2>&1; then
    tail -n 20 "$out/gpu_build.txt"
    fail build "see $out/gpu_build.txt (needs nvcc, setuptools, pybind11>=3 and ninja); what was built before is used"
  fi
  "$python" -m m3kernels | tee "$out/gpu_report.txt" || fail build "python -m m3kernels"
}

declare -A gates=() # family -> passed or failed, of this run
test_seconds=$(limit tests) # left of it
gate() { # run the GPU tests of a family, unless they passed on these sources before
  local family=$1 stamp files began=$SECONDS
  stamp=$state/passed/$family-$(digest)
  if [ -z "${gates[$family]:-}" ]; then
    if [ -e "$stamp" ]; then
      gates[$family]=passed
      say "tests: $family: passed before on these sources"
    else
      files=(tests/kernels/test_"$family"*.py)
      say "tests: $family"
      if timeout --kill-after=10 $((test_seconds > 5 ? test_seconds : 5)) "$python" -m pytest -q -m gpu "${files[@]}" 2>&1 |
        tee "$out/gpu_tests_$family.txt" | tail -n 25; then
        gates[$family]=passed
        mkdir -p "$state/passed" && touch "$stamp"
      else
        gates[$family]=failed
        fail tests "$family: see $out/gpu_tests_$family.txt; it is not measured"
      fi
      test_seconds=$((test_seconds - SECONDS + began))
    fi
  fi
  [ "${gates[$family]}" = passed ]
}
tests() { local family; for family in $families; do gate "$family"; done; }

sanitize() {
  local tool
  if ! command -v compute-sanitizer >/dev/null; then
    skip sanitize "compute-sanitizer is not installed"
    return
  fi
  for tool in memcheck racecheck; do
    say "sanitize: $tool"
    bounded $(($(limit sanitize) / 2)) compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.gpu_smoke 2>&1 |
      tee "$out/gpu_$tool.txt" | tail -n 25 || fail sanitize "$tool: see $out/gpu_$tool.txt"
  done
}

measure() { # section, family whose tests must pass, arguments of python -m bench
  local section=$1 family=$2
  shift 2
  if ! gate "$family"; then
    skip "$section" "the GPU tests of $family did not pass: a time without them is no result"
    return
  fi
  say "$section: $*"
  bounded "$(limit "$section")" "$python" -m bench "$@" --out "$out/gpu_$section.jsonl" 2>&1 | tee "$out/gpu_$section.txt" ||
    fail "$section" "see $out/gpu_$section.txt (status 124: out of time; rows measured until then are kept)"
}
int4() { measure int4 int4 int4 --device cuda --preset gpu; }
peers() {
  local found
  found=$("$python" -c 'import importlib.util as u; print(*[n for n in ("gemlite", "humming", "vllm") if u.find_spec(n)])')
  if [ -z "$found" ]; then
    skip peers "none of gemlite, humming, vllm can be imported (PEERS=folder with their wheels)"
    return
  fi
  say "peers: $found"
  measure peers int4 int4 --device cuda --preset gpu_peers
}
moe() { measure moe int4 int4 --device cuda --preset gpu_moe; }
fp16() { measure fp16 int4 int4 --device cuda --preset gpu_fp16; }
crossover() { measure crossover int4 int4 --device cuda --preset gpu_crossover; }
spec_decode() { measure spec_decode spec_decode spec_decode --device cuda; }
policy_loss() { measure policy_loss policy_loss policy_loss --device cuda; }
long() { measure long policy_loss policy_loss --device cuda --preset gpu_long; }

compile() { # object code of every kernel for every target, without a GPU
  local source arch flags=() nvcc
  nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
  if ! command -v "$nvcc" >/dev/null; then
    skip compile "nvcc is not installed"
    return
  fi
  for arch in ${M3_CUDA_ARCHS:-80 90a 100a 120a}; do
    for arch in ${arch//[;,]/ }; do flags+=("-gencode=arch=compute_$arch,code=sm_$arch"); done
  done
  mkdir -p "$state/compile"
  for source in csrc/*/*.cu; do
    say "compile: $source"
    bounded "$(limit compile)" "$nvcc" -std=c++20 -O3 -DNDEBUG -fmad=false -Icsrc "${flags[@]}" -c "$source" \
      -o "$state/compile/$(basename "$source").o" || fail compile "$source"
  done
}

# -- run ----------------------------------------------------------------------------------------------------------------
mkdir -p "$out"
if [ -n "$gpu" ]; then
  say "GPU: $gpu, compute capability $capability; sections: $sections"
  if [ -n "${PEERS:-}" ]; then unpack_peers; fi
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__); sys.exit(not torch.cuda.is_available())' ||
    { fail torch "torch does not see the GPU that nvidia-smi names"; exit 1; }
fi
for section in $sections; do
  if [ -z "$gpu" ] && [ "$section" != compile ]; then
    skip "$section" "no CUDA GPU here (nvidia-smi names none): ${about[$section]}"
    continue
  fi
  began=$SECONDS
  "$section"
  say "$section: $((SECONDS - began)) s"
done
if [ -n "$gpu" ]; then
  "$python" -m bench goals --results "$out" | tee "$out/gpu_goals.txt" || fail goals "the rows in $out cannot be read"
fi
if [ "$failed" = 0 ]; then say "nothing failed"; else say "something FAILED, see above"; fi
exit "$failed"
