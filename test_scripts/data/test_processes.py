"""Worker processes: what dies or hangs costs its own task only."""

import signal

import pytest

from finetune.data.processes import run_tasks
from finetune.errors import UserError
from pool_tasks import make_worker, refuse_to_start, say_what_is_blocked


def test_a_worker_that_dies_costs_its_own_task_only():
    tasks = ["one", "die", "two", "fail", "three"]
    outcomes = sorted(run_tasks(make_worker, tasks, num_workers=2), key=lambda outcome: outcome.task)
    assert outcomes == [
        ("die", None, "the process that worked on it was killed by signal 9."),
        ("fail", "fail failed", None),
        ("one", None, None),
        ("three", None, None),
        ("two", None, None),
    ]


def test_a_worker_that_hangs_costs_its_own_task_only():
    outcomes = list(
        run_tasks(
            make_worker,
            ["hang", "one"],
            num_workers=1,
            isolated=True,
            time_limit_sec=lambda task: 0.0 if task == "hang" else 60.0,
        )
    )
    assert outcomes == [
        ("hang", None, "it took too long; the process that worked on it was ended."),
        ("one", None, None),
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_engine_that_cannot_start_ends_the_run(num_workers):
    with pytest.raises(UserError, match="not installed"):
        list(run_tasks(refuse_to_start, ["one"], num_workers=num_workers))


def test_workers_do_not_hear_ctrl_c_from_their_first_moment_on():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    outcomes = list(run_tasks(say_what_is_blocked, ["one", "two"], num_workers=2))
    assert all(signal.SIGINT in outcome.result for outcome in outcomes)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
