#!/usr/bin/env bash
# Every figure of the data side that needs a GPU, in parts of less than ten minutes each; figures go to $OUT as JSON and text.
#
#   benchmarks/gpu.sh PART IMAGES [CIFAR]      PART: tests mix profile-dali profile-resident cifar, or all of them
#
# IMAGES is a folder of photographs (JPEG), CIFAR the folder of cifar-100-python/; OUT defaults to benchmarks/gpu. What comes out is for
# benchmarks/h200.md, which does not exist yet because no GPU figure has been measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="benchmarks/gpu.sh PART IMAGES [CIFAR]; parts: tests mix profile-dali profile-resident cifar all"
part=${1:-} images=${2:-} cifar=${3:-}
out=${OUT:-benchmarks/gpu}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/bce3s-gpu}
python=${PYTHON:-python}
die() { echo "error: $*" >&2; exit 2; }

case $part in
tests | mix) ;;
profile-dali | profile-resident) [[ -d $images ]] || die "IMAGES is not a folder: $usage" ;;
cifar) [[ -d $cifar ]] || die "CIFAR is not a folder: $usage" ;;
all) [[ -d $images && -d $cifar ]] || die "IMAGES and CIFAR must be folders: $usage" ;;
*) die "unknown part '$part': $usage" ;;
esac
mkdir -p "$out" "$scratch"

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader || echo "no nvidia-smi"
    "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    git rev-parse HEAD 2>/dev/null || true
} >"$out/machine.txt"

# 40 names for each photograph: of 295 photographs an epoch lasts 46 steps of 256.
photo_shards() {
    [[ -f $scratch/shards/manifest.json ]] && return
    rm -rf "$scratch/photos" "$scratch/shards"
    PYTHONPATH=$PWD:$PWD/benchmarks "$python" - "$images" "$scratch" <<'PYTHON'
import sys
from pathlib import Path

from photographs import link_photographs, shard_photographs

if __name__ == "__main__":
    images, scratch = map(Path, sys.argv[1:])
    link_photographs(images, scratch / "photos", repeats=40)
    shard_photographs(scratch / "photos", scratch / "shards")
PYTHON
}

profile() { # loader
    photo_shards
    "$python" -m bce3s.cli profile --dataset folder --shards "$scratch/shards" --loader "$1" --arch resnet50 --batch-size 256 \
        --precision bf16 --device cuda --compile --json "$out/profile-$1.json" --plot "$out/profile-$1.png" --trace "$out/trace-$1.json" |
        tee "$out/profile-$1.txt"
}

# The reference recipe's step for 20 epochs of a schedule of 20, eager and compiled: views/s, and that it learns.
cifar_runs() {
    [[ -f $scratch/cifar100/manifest.json ]] ||
        "$python" tools/make_shards.py --dataset cifar100-lt --source "$cifar" --imbalance-factor 100 --out "$scratch/cifar100"
    for compile in false true; do
        timeout 270 "$python" -m bce3s.cli fast-train --dataset cifar100-lt --shards "$scratch/cifar100" --loader resident --precision bf16 \
            --epochs 20 --set compile=$compile --out "$scratch/cifar100-compile-$compile" --overwrite 2>&1 |
            tee "$out/cifar-compile-$compile.txt" || echo "compile=$compile did not finish" | tee -a "$out/cifar-compile-$compile.txt"
        cp "$scratch/cifar100-compile-$compile/metrics.jsonl" "$out/cifar-compile-$compile.jsonl" || true
    done
}

measure() { # part
    case $1 in
    tests) "$python" -m pytest -m cuda -q 2>&1 | tee "$out/tests.txt" ;;
    mix) "$python" benchmarks/mix.py --device cuda --json "$out/mix.json" | tee "$out/mix.txt" ;;
    profile-dali) profile dali ;; # sweeps the hardware decoder's share, too, and remembers the best
    profile-resident) profile resident ;;
    cifar) cifar_runs ;;
    esac
}

if [[ $part == all ]]; then
    for each in tests mix profile-dali profile-resident cifar; do
        measure "$each" || echo "$each failed" | tee -a "$out/failed.txt"
    done
else
    measure "$part"
fi
