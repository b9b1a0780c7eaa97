#!/usr/bin/env bash
# What a machine with a GPU is for, in order: every kernel against its reference, the bench with a
# full-width step of every method in both precisions, the experiments.
#     OUT=folder tests/gpu_session.sh [methods of results/reproduce.sh]
#     DEVICE=cpu OUT=folder tests/gpu_session.sh     # tries this script: small, without experiments
# A call stops at LIMIT seconds (default 540); a part that has ended leaves its mark in runs/gpu
# (<part>.done or <part>.failed, remove it to run the part again): call again until it says done.
# Tests that need no GPU are left to pytest. runs/gpu keeps logs and bench.csv; at the end of each
# call these go to $OUT/gpu.tgz, with the rows of the runs.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to the folder for the results}"
out=runs/gpu
mkdir -p "$out" "$OUT"
trap 'tar --exclude="*.ckpt" --exclude="*.pt" -czf "$OUT/gpu.tgz" runs' EXIT
export PYTHONUNBUFFERED=1
device=${DEVICE:-cuda}
python3 -c "import torch; torch.zeros(1, device='$device')" || exit 2

part() { # name, command: once; again only if the limit stopped it
  local name=$1 left=$((${LIMIT:-540} - SECONDS)) code
  shift
  [ ! -e "$out/$name.done" ] && [ ! -e "$out/$name.failed" ] || return 0
  [ "$left" -gt 5 ] || { echo "$name: next call"; exit 75; }
  echo "+ $*" | tee -a "$out/$name.log"
  timeout --signal INT --kill-after 20 "$left" "$@" 2>&1 | tee -a "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) touch "$out/$name.done" ;;
    124 | 130 | 137) echo "$name: stopped at the limit: call again"; exit 75 ;;
    *) echo "$name: status $code" | tee "$out/$name.failed" ;;
  esac
}

ops="masked_step gaussian_cutout augment window_energy place_patches tanh_perturb adain patch_local"
for name in $ops embed attacks generator; do
  part "test_$name" python3 -m pytest -q "tests/test_$name.py"
done
small=()
[ "$device" = cpu ] && small=(--ops masked_step doa step --batch 16 --rounds 5)
part bench python3 -m tests.bench "${small[@]}" --out "$out/bench.csv"
[ "$device" = cpu ] || part reproduce bash results/reproduce.sh "$@" # all goes on by itself
cat "$out"/*.failed 2> /dev/null && { echo "done, but for these"; exit 1; }
echo done
