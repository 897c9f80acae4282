"""The Slurm launcher, with fakes of Slurm's commands and of torchrun on the path."""

import os
import signal
import subprocess
import sys
import time

import pytest

from project_root import ROOT

SCRIPT = ROOT / "slurm" / "training" / "train_moshi_ttt.slurm"
YAML = "example/moshi_7B_ttt.yaml"

# Waits for USR1 where there is a file `long`, as a training does that is not finished, and takes a while to
# save. Its launcher must have ignored the signal before: torchrun itself would die of it.
TORCHRUN = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
state = pathlib.Path(os.environ["FAKE_STATE"])
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "USR1 is not ignored"
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
with (state / "torchrun").open("a") as file:
    file.write("\\0".join(sys.argv[1:]) + "\\n")
allocator = [f"{{name}}={{value}}" for name, value in os.environ.items() if "ALLOC_CONF" in name]
(state / "allocator").write_text("\\n".join(allocator))
node = os.environ.get("SLURM_NODEID", "0")
long = (state / "long").exists()
if long:
    (state / f"tmp.{{node}}").write_text(f"{{os.getpid()}}\\n")
    (state / f"tmp.{{node}}").rename(state / f"pid.{{node}}")
deadline = time.monotonic() + 30
while long and not stopped and time.monotonic() < deadline:
    time.sleep(0.02)
if stopped:
    time.sleep(0.5)
    assert len(stopped) == 1, "a second signal would have stopped at once"
    (state / f"saved.{{node}}").touch()
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""
# A task per node; the status is the highest one.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >"$FAKE_STATE/srun"
for argument in "$@"; do [[ $argument == --nodes=* ]] && nodes=${argument#--nodes=}; done
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
highest=0
for pid in "${pids[@]}"; do
  status=0
  wait "$pid" || status=$?
  ((status > highest)) && highest=$status
done
exit "$highest"
"""
SCANCEL = """#!/bin/bash
echo "$@" >>"$FAKE_STATE/scancel"
kill -USR1 $(cat "$FAKE_STATE"/pid.*)
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then
  printf 'node%s\\n' 7 8 9
else
  echo "$@ after $(cd "$FAKE_STATE" && echo saved.*)" >>"$FAKE_STATE/scontrol"
  exit "${FAKE_SCONTROL_STATUS:-0}"
fi
"""


class Cluster:
    """Runs the script as sbatch does, again after each requeue.

    Args:
        folder: for the fakes and what they write down.
        slurm: whether Slurm's commands and variables are there.
        variables: more of the environment.
    """

    def __init__(self, folder, *, slurm=True, **variables):
        self.state = folder / "state"
        self.state.mkdir()
        commands = {"torchrun": TORCHRUN}
        if slurm:
            commands |= {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}
            variables = {"SLURM_JOB_ID": "54321", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "8"} | variables
        (folder / "bin").mkdir()
        for name, text in commands.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {
            "PATH": path,
            "VENV": str(folder / "none"),
            "FAKE_STATE": str(self.state),
        } | variables

    def start(self, *, restarts=0, cwd=ROOT):
        """The batch script as a process."""
        environment = self.environment | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", str(SCRIPT)], cwd=cwd, env=environment, **pipes)

    def run(self, **options):
        """Run to the end; status, output, errors."""
        process = self.start(**options)
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors

    def run_until_the_limit(self, *, nodes=1, signals=1, **options):
        """Start a training that would go on, send USR1 once all nodes are at work."""
        (self.state / "long").touch()
        process = self.start(**options)
        deadline = time.monotonic() + 20
        while len(list(self.state.glob("pid.*"))) < nodes:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        for _ in range(signals):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        output, errors = process.communicate(timeout=30)
        (self.state / "long").unlink()
        return process.returncode, output, errors

    def log(self, name):
        """What a fake command was called with, a call per line."""
        path = self.state / name
        return path.read_text().splitlines() if path.exists() else []


def test_yaml_and_overrides_reach_one_process_per_gpu(tmp_path):
    cluster = Cluster(tmp_path, slurm=False, YAML=YAML, SLURM_GPUS_ON_NODE="4", ARGS="--optim.lr 1e-6")
    status, output, errors = cluster.run()
    assert status == 0, errors
    assert output.startswith(f"Training {YAML} with 4 processes on ")
    expected = f"--standalone --nproc-per-node 4 -m train {YAML} --resume auto --optim.lr 1e-6"
    assert cluster.log("torchrun")[0].split("\0") == expected.split()


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}], ids=str
)
def test_the_allocator_is_set_by_the_name_that_pytorch_does_not_warn_of(tmp_path, given):
    cluster = Cluster(tmp_path, slurm=False, YAML=YAML, **given)
    assert cluster.run()[0] == 0
    assert cluster.log("allocator") == [
        f"PYTORCH_ALLOC_CONF={'a:1' if given else 'expandable_segments:True'}"
    ]


def test_every_node_joins_one_rendezvous_on_the_first(tmp_path):
    nodes = {"SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_GPUS_ON_NODE": "8"}
    cluster = Cluster(tmp_path, YAML=YAML, **nodes)
    status, output, errors = cluster.run()
    assert (status, errors) == (0, "")
    assert output.splitlines() == [
        f"Job 54321: training {YAML} with 8 processes on each of 3 nodes, first node7",
        "Job 54321: the training is finished",
    ]
    srun = (cluster.state / "srun").read_text().split("\0")
    assert srun[:5] == [
        "--nodes=3",
        "--ntasks=3",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
    ]
    shared = "--nnodes 3 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node7:26321 --rdzv-id 54321"
    calls = sorted(line.split("\0") for line in cluster.log("torchrun"))
    assert [call[:2] for call in calls] == [["--rdzv-conf", f"is_host={n}"] for n in (0, 0, 1)]
    assert all(call[2:] == f"{shared} -m train {YAML} --resume auto".split() for call in calls)


def test_jobs_on_one_node_have_ports_of_their_own(tmp_path):
    ports = []
    for job in ("54321", "54322"):
        (tmp_path / job).mkdir()
        cluster = Cluster(tmp_path / job, YAML=YAML, SLURM_JOB_ID=job)
        assert cluster.run()[0] == 0
        arguments = cluster.log("torchrun")[0].split("\0")
        ports.append(arguments[arguments.index("--rdzv-endpoint") + 1])
    assert ports == ["node7:26321", "node7:26322"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_at_the_time_limit_the_training_saves_and_the_job_is_requeued(tmp_path, nodes):
    cluster = Cluster(tmp_path, YAML=YAML, SLURM_NNODES=str(nodes))
    status, output, errors = cluster.run_until_the_limit(nodes=nodes)
    assert (status, errors) == (0, "")
    assert cluster.log("scancel") == ["--signal=USR1 54321.0"]
    saved = " ".join(f"saved.{node}" for node in range(nodes))
    assert cluster.log("scontrol") == [f"requeue 54321 after {saved}"], "once, and not before it has saved"
    assert "back into the queue" in output and "finished" not in output
    status, output, errors = cluster.run(restarts=1)
    assert (status, errors) == (0, "")
    first, last = output.splitlines()
    assert first == (
        f"Job 54321, requeued (1 of at most 100 times): {YAML} goes on from its newest checkpoint"
    )
    assert last == "Job 54321: the training is finished"
    assert len(cluster.log("scontrol")) == 1
    assert all("train\0" + YAML + "\0--resume\0auto" in line for line in cluster.log("torchrun"))


def test_a_second_signal_does_not_reach_the_training(tmp_path):
    cluster = Cluster(tmp_path, YAML=YAML)
    status, _, errors = cluster.run_until_the_limit(signals=3)
    assert (status, errors) == (0, "")
    assert len(cluster.log("scancel")) == len(cluster.log("scontrol")) == 1


def test_without_scancel_the_signal_goes_through_srun(tmp_path):
    cluster = Cluster(tmp_path, YAML=YAML)
    (tmp_path / "bin" / "scancel").write_text("#!/bin/bash\nexit 1\n")
    forwarding = SRUN.replace(
        "highest=0", 'highest=0\ntrap \'kill -USR1 "${pids[@]}"; wait "${pids[@]}"; exit\' USR1'
    )
    (tmp_path / "bin" / "srun").write_text(forwarding)
    assert cluster.run_until_the_limit()[0] == 0
    assert cluster.log("scontrol") == ["requeue 54321 after saved.0"]


def test_a_failure_is_passed_on_and_not_requeued(tmp_path):
    cluster = Cluster(tmp_path, YAML=YAML, FAKE_STATUS="2")
    status, _, errors = cluster.run()
    assert status == 2
    assert errors.splitlines() == ["Job 54321: the training failed with status 2; not requeued"]
    status, _, errors = cluster.run_until_the_limit()
    assert status == 2
    assert errors.splitlines() == [
        "Job 54321: the training failed with status 2 while it stopped; not requeued"
    ]
    assert cluster.log("scontrol") == []


def test_requeueing_has_an_end(tmp_path):
    cluster = Cluster(tmp_path, YAML=YAML, MAX_REQUEUES="2")
    status, _, errors = cluster.run_until_the_limit(restarts=2)
    assert status == 1 and cluster.log("scontrol") == []
    assert "requeued 2 times already (MAX_REQUEUES)" in errors and len(errors.splitlines()) == 1


def test_a_requeue_that_slurm_refuses_is_said(tmp_path):
    cluster = Cluster(tmp_path, YAML=YAML, FAKE_SCONTROL_STATUS="1")
    status, _, errors = cluster.run_until_the_limit()
    assert status == 1 and "cannot be requeued; sbatch again goes on from the checkpoint" in errors


@pytest.mark.parametrize("slurm", [True, False])
def test_a_configuration_with_spaces_and_quotes_in_its_name(tmp_path, slurm):
    name = 'my runs/it\'s $HOME "first".yaml'
    (tmp_path / "my runs").mkdir()
    (tmp_path / name).write_text("")
    cluster = Cluster(tmp_path, slurm=slurm, YAML=name)
    assert cluster.run(cwd=tmp_path)[0] == 0
    arguments = cluster.log("torchrun")[0].split("\0")
    assert arguments[-5:] == ["-m", "train", name, "--resume", "auto"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "YAML is not set"),
        ({"YAML": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"YAML": YAML, "MAX_REQUEUES": "ever"}, "MAX_REQUEUES: ever is not a whole number"),
    ],
)
def test_a_missing_configuration_ends_with_one_line(tmp_path, variables, message):
    status, _, errors = Cluster(tmp_path, **variables).run()
    assert status == 2
    assert message in errors and len(errors.splitlines()) == 1


def test_what_slurm_reads_from_the_head_of_the_script():
    lines = SCRIPT.read_text().splitlines()
    for line in (
        "--output=logs/training/moshi_ttt.%j.log",
        "--error=logs/training/moshi_ttt.%j.err",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--ntasks-per-node=1",
    ):
        assert f"#SBATCH {line}" in lines
