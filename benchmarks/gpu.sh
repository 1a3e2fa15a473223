#!/usr/bin/env bash
# Every figure that needs a GPU, in parts of less than ten minutes each; figures go to $OUT as JSON and text.
#
#   benchmarks/gpu.sh PART [IMAGES [CIFAR]]      PART: one of those below, or all of them
#
#   tests mix              the tests marked cuda; the mixing kernel against the copy bandwidth
#   step step-features     the step of ResNet-50 and ResNeXt-50 rung by rung; what features, saves and the host's work cost
#   loss                   the loss at 10 to 8,142 classes, and its share of the step (after step)
#   resume                 a deterministic run that is stopped and continued ends with the bits of one that was left alone
#   profile-dali profile-resident      from disk to gradients; need IMAGES
#   cifar                  20 epochs eager and compiled; needs CIFAR
#   cifar100-reference     the reference recipe on CIFAR100-LT to its end, both stages, seed 0; every call continues it; needs CIFAR
#   ablation               rows of the paper's ablation by bce3s reproduce, ROWS=a,b (all of them) and SEEDS (0); every call continues; needs CIFAR
#
# IMAGES is a folder of photographs (JPEG), CIFAR the folder of cifar-100-python/; OUT defaults to benchmarks/gpu. What comes out is for
# benchmarks/h200.md, which does not exist yet because no GPU figure has been measured. To try the newer parts without a GPU: DEVICE=cpu,
# with BATCH, SIDE, DIM, ARCHS, EPOCHS, LIMIT_S, BUDGET=small (of ablation) and EXTRA (more arguments of fast-train, or of reproduce) as small
# as need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=(tests mix step step-features loss resume profile-dali profile-resident cifar cifar100-reference ablation)
usage="benchmarks/gpu.sh PART [IMAGES [CIFAR]]; parts: ${parts[*]} all"
part=${1:-} images=${2:-} cifar=${3:-}
out=${OUT:-benchmarks/gpu}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/bce3s-gpu}
python=${PYTHON:-python}
device=${DEVICE:-cuda} batch=${BATCH:-256} side=${SIDE:-224} dim=${DIM:-2048}
read -ra archs <<<"${ARCHS:-resnet50 resnext50-32x4d}"
read -ra extra <<<"${EXTRA:-}"
die() { echo "error: $*" >&2; exit 2; }

case $part in
tests | mix | step | step-features | loss | resume) ;;
profile-dali | profile-resident) [[ -d $images ]] || die "IMAGES is not a folder: $usage" ;;
cifar | cifar100-reference | ablation) [[ -d $cifar ]] || die "CIFAR is not a folder: $usage" ;;
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
        --precision bf16 --device cuda --compile --json-out "$out/profile-$1.json" --plot "$out/profile-$1.png" --trace "$out/trace-$1.json" |
        tee "$out/profile-$1.txt"
}

cifar_shards() {
    [[ -f $scratch/cifar100/manifest.json ]] ||
        "$python" tools/make_shards.py --dataset cifar100-lt --source "$cifar" --imbalance-factor 100 --out "$scratch/cifar100"
}

# The reference recipe's step for 20 epochs of a schedule of 20, eager and compiled: views/s, and that it learns.
cifar_runs() {
    cifar_shards
    for compile in false true; do
        timeout 270 "$python" -m bce3s.cli fast-train --dataset cifar100-lt --shards "$scratch/cifar100" --loader resident --precision bf16 \
            --epochs 20 --set compile=$compile --out "$scratch/cifar100-compile-$compile" --overwrite 2>&1 |
            tee "$out/cifar-compile-$compile.txt" || echo "compile=$compile did not finish" | tee -a "$out/cifar-compile-$compile.txt"
        cp "$scratch/cifar100-compile-$compile/metrics.jsonl" "$out/cifar-compile-$compile.jsonl" || true
    done
}

step() { # name of the figures, arch, seconds at most, what benchmarks/step.py is to measure
    timeout "$3" "$python" benchmarks/step.py "${@:4}" --device "$device" --arch "$2" --image-size "$side" --batch-size "$batch" \
        --classes 1000 --rounds 5 --seconds 0.5 --json "$out/$1.json" 2>&1 | tee "$out/$1.txt" ||
        echo "$1 did not finish" | tee -a "$out/$1.txt"
}

step_ladders() {
    for arch in "${archs[@]}"; do step "step-$arch" "$arch" $((580 / ${#archs[@]})) ladder; done
}

# The share of the loss in a step of the same batch, features and 1,000 classes.
loss_share() {
    "$python" - "$out/loss.json" "$out/step-${archs[0]}.json" <<'PYTHON'
import json
import sys
from pathlib import Path

loss_file, step_file = map(Path, sys.argv[1:])
if step_file.is_file():
    loss_ms = json.loads(loss_file.read_text())["loss, 1000 classes"]["ours_ms"]
    rows = json.loads(step_file.read_text())["ladder"]["rows"]
    for name in ("bf16", "compiled", "graphed", "compiled+graphed"):
        if "step_ms" in rows.get(name, {}):
            step_ms = rows[name]["step_ms"]
            print(f"loss {loss_ms:.3f} ms of {step_ms:.3f} ms of the step '{name}' in {step_file.name}: {loss_ms / step_ms:.2%}")
else:
    print(f"no {step_file}: run the part 'step' first, then this one again for the share of the loss in a step")
PYTHON
}

# Two pairs of runs, eager and with CUDA graphs: one of each pair is left alone, the other gets SIGTERM in the middle of an epoch.
resumed_runs() {
    [[ -f $scratch/demo/manifest.json ]] || "$python" tools/make_shards.py --dataset demo --out "$scratch/demo"
    for graphs in false true; do
        local whole=$scratch/resume-whole-$graphs cut=$scratch/resume-cut-$graphs
        local train=("$python" -m bce3s.cli fast-train --dataset demo --shards "$scratch/demo" --loader resident --device "$device"
            --deterministic --epochs "${EPOCHS:-30}" --set cuda_graphs=$graphs --set log_every=5 "${extra[@]}")
        rm -rf "$whole" "$cut"
        "${train[@]}" --out "$whole"
        "${train[@]}" --out "$cut" &
        local pid=$!
        until grep -qs '"kind": "step", "epoch": 1' "$cut/metrics.jsonl" || ! kill -0 $pid; do sleep 0.05; done
        kill -TERM $pid || true
        wait $pid
        if grep -q '"kind": "summary"' "$cut/metrics.jsonl"; then
            echo "cuda_graphs=$graphs: the run ended before it could be stopped; raise EPOCHS"
            return 1
        fi
        "${train[@]}" --out "$cut" --resume
        compare_runs "$whole" "$cut" "cuda_graphs=$graphs"
    done
}

compare_runs() { # one run, another one, what to call them
    "$python" - "$@" <<'PYTHON'
import sys
from pathlib import Path

import torch

from bce3s.checkpoint import CheckpointFolder


def leaves(tree, name):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{name}.{number}")
    else:
        yield name, tree


whole, cut = (CheckpointFolder(Path(run), keep=2).load_newest(torch.device("cpu")).state for run in sys.argv[1:3])
ours, theirs = ({n: v for part in ("model", "optimizer", "average") for n, v in leaves(state[part], part)} for state in (cut, whole))
tensors = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
same = lambda one, other: torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
unlike = [name for name in theirs if name not in ours or not same(theirs[name], ours[name])] + [name for name in ours if name not in theirs]
print(f"{sys.argv[3]}: {len(tensors)} tensors after {whole['cursor']['global_step']} steps, {len(unlike)} unlike {unlike[:3]}")
sys.exit(bool(unlike) or whole["cursor"]["global_step"] != cut["cursor"]["global_step"])
PYTHON
}

# In as many calls as it takes: the clock stops a call with SIGTERM, which saves the run, and the next one continues it. A way of running
# that fails by itself gives way to the next one, which begins anew. Evaluated every 20 epochs: the headline is the last epoch's anyway.
cifar100_reference() {
    cifar_shards
    local ends_s=$((SECONDS + ${LIMIT_S:-540})) settings status began_s run
    for settings in "compile=true cuda_graphs=true" "compile=false cuda_graphs=true" "compile=false cuda_graphs=false"; do
        run=$scratch/cifar100-reference-${settings// /-}
        [[ -f $run.failed ]] && continue
        ((ends_s - SECONDS > 10)) || break # 0 would mean no limit
        status=0 began_s=$SECONDS
        timeout --signal TERM --kill-after 30 $((ends_s - SECONDS)) "$python" -m bce3s.cli fast-train --dataset cifar100-lt --stages 2 --seed 0 \
            --recipe cifar100lt_resnet34_320ep --shards "$scratch/cifar100" --device "$device" --loader resident \
            --precision "${PRECISION:-fp32}" --epochs "${EPOCHS:-320}" --set "${settings% *}" --set "${settings#* }" --set eval_every=20 \
            --out "$run" --resume "${extra[@]}" 2>&1 | tee -a "$out/cifar100-reference.txt" || status=$?
        echo "$settings: $((SECONDS - began_s)) s, exit status $status" | tee -a "$run.calls"
        cp "$run/metrics.jsonl" "$out/cifar100-reference.jsonl" || true
        case $status in
        0) reference_result "$run" ;;
        124 | 137) echo "stopped by the clock; call this part again to continue" ;; # 137: killed while it ended, from its last save then
        *) touch "$run.failed" && continue ;;
        esac
        return
    done
    echo "not finished: see $out/cifar100-reference.txt, then call this part again"
    return 1
}

reference_result() { # run
    "$python" - "$1" <<'PYTHON' | tee "$out/cifar100-reference-result.txt"
import sys
from pathlib import Path

from bce3s.runlog import read_metrics

run = Path(sys.argv[1])
lines = read_metrics(run)
epochs = [line for line in lines if line["kind"] == "epoch"]
calls = Path(f"{run}.calls").read_text().splitlines()
wall_s = sum(int(call.split(": ")[1].split(" s")[0]) for call in calls)
print(f"{len(epochs)} epochs, {wall_s} s wall-clock in {len(calls)} calls, {sum(line['train_s'] for line in epochs):.0f} s of them training")
for stage, summary in (("stage one", lines[-1]), ("stage two", read_metrics(run / "stage2-bce")[-1])):
    for name, title in (("last_epoch_no_tta", "no TTA"), ("last_epoch_flip_tta", "flip TTA")):
        groups = ", ".join(f"{group} {summary[name][group]:.2f}" for group in ("all", "many", "medium", "few") if summary[name][group] is not None)
        print(f"{stage}, last epoch, {title}: {groups}")
print("the authors' log: stage one 54.73 without TTA, 55.43 with flip TTA; stage two 57.75 without TTA")
PYTHON
}

# The command keeps finished runs and continues the one that the clock stopped; its table is whole after every run.
ablation() {
    local status=0 rows=() budget=${BUDGET:-full}
    [[ -z ${ROWS:-} ]] || rows=(--rows "$ROWS")
    timeout --signal TERM --kill-after 30 "${LIMIT_S:-540}" "$python" -m bce3s.cli reproduce ablation-cifar100 --source "$cifar" \
        --out "$scratch/ablation" --budget "$budget" --seeds "${SEEDS:-0}" --device "$device" "${rows[@]}" "${extra[@]}" 2>&1 |
        tee -a "$out/ablation.txt" || status=$?
    cp "$scratch"/ablation/*.md "$scratch"/ablation/*.json "$out/" || true
    case $status in
    124 | 137) echo "stopped by the clock; call this part again to continue" ;;
    *) return "$status" ;;
    esac
}

measure() { # part
    case $1 in
    tests) "$python" -m pytest -m cuda -q 2>&1 | tee "$out/tests.txt" ;;
    mix) "$python" benchmarks/mix.py --device cuda --json "$out/mix.json" | tee "$out/mix.txt" ;;
    step) step_ladders ;;
    step-features) step step-features "${archs[0]}" 580 features saves host ;;
    loss)
        "$python" benchmarks/loss.py --device "$device" --batch-size "$batch" --dim "$dim" --uniform-dim "$dim" --json "$out/loss.json" |
            tee "$out/loss.txt"
        loss_share | tee -a "$out/loss.txt"
        ;;
    resume) resumed_runs 2>&1 | tee "$out/resume.txt" ;;
    profile-dali) profile dali ;; # sweeps the hardware decoder's share, too, and remembers the best
    profile-resident) profile resident ;;
    cifar) cifar_runs ;;
    cifar100-reference) cifar100_reference ;;
    ablation) ablation ;;
    esac
}

if [[ $part == all ]]; then
    for each in "${parts[@]}"; do
        measure "$each" || echo "$each failed" | tee -a "$out/failed.txt"
    done
else
    measure "$part"
fi
