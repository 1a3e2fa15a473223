"""The scripts of docs/slurm: what SLURM reads of them is what it knows, and they train, queue themselves again after a stop, and end."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bce3s.runlog import read_metrics
from tests.docs_world import ROOT, make_world, programs

SCRIPTS = sorted((ROOT / "docs" / "slurm").glob("*.sbatch"))
KNOWN = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gpus-per-task", "cpus-per-task", "time", "signal", "requeue"),
    *("open-mode", "output", "array"),
}
# The first start is stopped after its first line, as by a signal; every other runs what it is given.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >>srun-options; shift; done
if [[ ! -e stopped ]]; then
    touch stopped
    echo "$*" >first-command
    mkdir -p "$RUN" && echo '{"kind": "step"}' >"$RUN/metrics.jsonl"
    exit 0
fi
rm -f "$RUN/metrics.jsonl"
exec "$@"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_knows_every_line_that_is_for_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    told = [line for line in lines if line.startswith("#SBATCH")]
    for line in told:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)  # a comment behind it would be read as part of it
        assert found, line
        assert found[1] in KNOWN, line
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line in told), "SLURM stops reading at the first command"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_stopped_job_is_queued_again_and_then_ends(tmp_path: Path, script: Path) -> None:
    checkout = make_world(tmp_path)
    array = script.stem.startswith("array")
    run = checkout / "runs" / "mine" / ("s1" if array else "")
    with programs(tmp_path) as environment:
        for name, text in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "$*" >>scontrol-calls\n')):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        environment |= {"OUT": "runs/mine", "RUN": str(run), "SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "2"}

        def bash(*command: str) -> None:
            done = subprocess.run(["bash", *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

        bash("-c", "python tools/make_shards.py --dataset folder --source ~/photos --out shards/folder")
        bash(str(script), "--dataset", "folder", "--arch", "resnet18")
        assert (checkout / "scontrol-calls").read_text() == "requeue 17\n"
        assert "--resume" in (checkout / "first-command").read_text()
        bash(str(script), "--dataset", "folder", "--arch", "resnet18")
        assert (checkout / "scontrol-calls").read_text() == "requeue 17\n", "a finished run is not queued again"
        assert read_metrics(run)[-1]["kind"] == "summary"
        if array:
            bash("-c", "bce3s fast-train --dataset folder --arch resnet18 --seeds 1,2 --out runs/mine --resume")
            assert (checkout / "runs" / "mine" / "s2").is_dir()
