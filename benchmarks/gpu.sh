#!/usr/bin/env bash
# Every figure of the data side that needs a GPU, in parts of less than ten minutes each; figures go to $OUT as JSON and text.
#
#   benchmarks/gpu.sh PART [IMAGES] [CIFAR]        PART: tests mix profile-dali profile-resident cifar
#
# IMAGES is a folder of photographs (JPEG), CIFAR that of the official CIFAR-100 pickles; OUT defaults to benchmarks/gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part=${1:?name a part: tests mix profile-dali profile-resident cifar}
images=${2:-}
cifar=${3:-}
out=${OUT:-benchmarks/gpu}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/bce3s-gpu}
python=${PYTHON:-python}
mkdir -p "$out" "$scratch"

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader
    "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    git rev-parse HEAD 2>/dev/null || true
} >"$out/machine.txt"

# 11,800 photographs as links: 40 names for each of 295 images, so that an epoch lasts 46 steps of 256.
photo_shards() {
    [[ -f $scratch/shards/manifest.json ]] && return
    [[ -d $images ]] || { echo "error: name a folder of photographs: benchmarks/gpu.sh $part IMAGES" >&2; exit 2; }
    rm -rf "$scratch/photos"
    local split number file
    for split in train val test; do
        mkdir -p "$scratch/photos/$split"/{even,odd}
        for number in $(seq -w 1 "$([[ $split == train ]] && echo 40 || echo 2)"); do
            local class=even
            for file in "$images"/*.[jJ][pP]*[gG]; do
                class=$([[ $class == even ]] && echo odd || echo even)
                ln -s "$(realpath "$file")" "$scratch/photos/$split/$class/$number-$(basename "$file")"
            done
        done
    done
    "$python" tools/make_shards.py --dataset folder --source "$scratch/photos" --out "$scratch/shards" --overwrite
}

profile() { # loader
    photo_shards
    "$python" -m bce3s.cli profile --dataset folder --shards "$scratch/shards" --loader "$1" --arch resnet50 --batch-size 256 \
        --precision bf16 --device cuda --compile --json "$out/profile-$1.json" --plot "$out/profile-$1.png" --trace "$out/trace-$1.json" |
        tee "$out/profile-$1.txt"
}

case $part in
tests)
    "$python" -m pytest -m cuda -q | tee "$out/tests.txt"
    ;;
mix)
    "$python" benchmarks/mix.py --device cuda --json "$out/mix.json" | tee "$out/mix.txt"
    ;;
profile-dali) profile dali ;; # sweeps hw_decoder_load, too, and remembers the best
profile-resident) profile resident ;;
cifar)
    [[ -d $cifar ]] || { echo "error: name the folder of cifar-100-python: benchmarks/gpu.sh cifar '' CIFAR" >&2; exit 2; }
    [[ -f $scratch/cifar100/manifest.json ]] ||
        "$python" tools/make_shards.py --dataset cifar100-lt --source "$cifar" --imbalance-factor 100 --out "$scratch/cifar100"
    # The first 20 epochs of the reference's 320, eager and compiled: views/s and accuracy.
    for compile in false true; do
        timeout 280 "$python" -m bce3s.cli fast-train --dataset cifar100-lt --shards "$scratch/cifar100" --loader resident --precision bf16 \
            --epochs 20 --set compile=$compile --out "$scratch/cifar100-compile-$compile" --overwrite | tee "$out/cifar-compile-$compile.txt"
        cp "$scratch/cifar100-compile-$compile/metrics.jsonl" "$out/cifar-compile-$compile.jsonl"
    done
    ;;
*)
    echo "error: unknown part '$part'; known: tests mix profile-dali profile-resident cifar" >&2
    exit 2
    ;;
esac
