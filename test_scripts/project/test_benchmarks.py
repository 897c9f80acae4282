"""The benchmarks: equal work, honest meters, a complete report. Never how fast anything is."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import diagnostics
from benchmarks.__main__ import main
from benchmarks.baselines.scan_autograd import scan_ttt_mlp
from benchmarks.common.inputs import Size, make_inputs
from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.memory import peak_bytes
from benchmarks.moshi_layer import add_ttt, make_stock_layer
from benchmarks.operator import UnequalResultsError, check_equal, operators
from benchmarks.profile import GROUPS, OTHER
from benchmarks.report import PARTS
from benchmarks.scaling import straight_line
from finetune.commands import run_command
from finetune.diagnose.judge import Judge
from golden_values import GOLDEN, check_golden_values
from moshi_ttt.ops import ttt_mlp

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, threads=1, repetitions=3, quick=True, compiled=False)
TIMES = {"median_seconds", "seconds"}
CANDIDATES = {"autograd", "manual", "scan, checkpointed", "scan"}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("checkpoint_group_size", [0, 1, 3])
def test_the_baseline_equals_the_golden_values(path, checkpoint_group_size):
    check_golden_values(path, partial(scan_ttt_mlp, checkpoint_group_size=checkpoint_group_size))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """The report of a quick run of all parts, as it was written."""
    path = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    assert main(["--quick", "--repetitions", "1", "--device", "cpu", "--out", str(path)]) == 0
    text = path.read_text()
    assert str(path.parent.parent) not in text
    headings = re.findall("^## (.*)$", path.with_suffix(".md").read_text(), re.MULTILINE)
    assert [heading.lower() for heading in headings] == list(PARTS)
    return json.loads(text)


def test_the_report_says_what_was_measured_on_what(report):
    assert set(report) == {"environment", "parts"}
    assert set(report["environment"]) == {
        *("date", "python", "torch", "moshi", "moshi_ttt", "device", "device_name", "threads", "dtype"),
        *("repetitions", "quick", "clock", "float32_matmul_precision"),
    }
    assert report["environment"]["clock"] == "process time"
    assert set(report["parts"]) == {
        "operator",
        "scaling",
        "streaming",
        "layer",
        "epoch",
        "check",
        "index",
        "diagnostics",
        "profile",
        "int8",
        "model",
    }


def test_all_numbers_are_finite_and_times_and_sizes_positive(report):
    numbers = list(_numbers(report["parts"]))
    assert len(numbers) > 100
    for key, number in numbers:
        assert math.isfinite(number), key
        if key in {"median_seconds", "seconds", "peak_bytes"}:
            assert number > 0, key


def test_every_candidate_has_all_repetitions(report):
    records = list(_records(report["parts"]))
    assert len(records) > 20
    assert all(len(record["seconds"]) == 1 for record in records)


def test_operator_part(report):
    cases = report["parts"]["operator"]["cases"]
    assert [case["causal"] for case in cases] == [True, False]
    for case in cases:
        assert set(case) == {"size", "causal", "largest_differences", "forward", "forward_backward"}
        for kind in ("forward", "forward_backward"):
            assert set(case[kind]) == {"useful_flops", "matrix_product", "candidates"}
            assert set(case[kind]["matrix_product"]) == TIMES | {"dim", "best_flops_per_second"}
            assert set(case[kind]["candidates"]) == CANDIDATES
            for candidate in case[kind]["candidates"].values():
                assert set(candidate) == TIMES | {
                    *("peak_bytes", "share_of_matrix_rate", "times_faster_than", "memory_relative_to"),
                }
            baseline = case[kind]["candidates"]["scan"]
            assert baseline["times_faster_than"]["scan"] == baseline["memory_relative_to"]["scan"] == 1


def test_scaling_part(report):
    part = report["parts"]["scaling"]
    assert set(part) == {
        *("size", "backend", "chunk_tokens", "lengths"),
        *("time_line", "memory_line", "inference_memory_growth"),
    }
    assert [one["num_tokens"] for one in part["lengths"]] == [64, 128, 256, 512]
    for one in part["lengths"]:
        assert set(one["forward_backward"]) == TIMES | {"peak_bytes"}
    for line in (part["time_line"], part["memory_line"]):
        assert set(line) == {"slope", "intercept", "r_squared"}


def test_training_memory_grows_in_a_line_and_that_of_inference_not_at_all(report):
    part = report["parts"]["scaling"]
    assert part["memory_line"]["r_squared"] > 0.95  # short sequences, so the steps of a group show
    assert part["inference_memory_growth"] == pytest.approx(1, abs=0.01)


def test_streaming_part(report):
    part = report["parts"]["streaming"]
    assert set(part) == {"inner_step", "layers"}
    inner, layers = part["inner_step"], part["layers"]
    assert set(inner["candidates"]) == {"step", "sum", "product with a vector"}
    assert inner["floor"] in {"sum", "product with a vector"}
    assert {"fast_weight_bytes", "floor_bytes_per_second", "step_over_floor"} <= set(inner)
    assert inner["fast_weight_bytes"] == 4 * 4 * (32 * 128 + 128 * 32)
    assert set(layers["candidates"]) == {
        *("ttt layer", "ttt layer without key shift"),
        *("moshi layer", "moshi layer with ttt"),
    }
    assert {
        "ttt_over_moshi",
        "key_shift_over_none",
        "with_over_without",
        "attention_window",
        "parameters",
    } <= set(layers)


def test_layer_part(report):
    modes = report["parts"]["layer"]["modes"]
    assert set(modes) == {"everything trains", "base frozen"}
    for mode in modes.values():
        assert set(mode) == {
            *("parameters", "candidates", "with_over_without", "memory_with_over_without"),
        }
        assert set(mode["candidates"]) == {"with ttt", "without ttt"}
        for candidate in mode["candidates"].values():
            assert set(candidate) == TIMES | {"peak_bytes"}


def test_profile_part(report):
    cases = report["parts"]["profile"]["cases"]
    assert len(cases) == 5 and next(iter(cases)) == "quickstart"
    for name, seconds in cases.items():
        assert set(seconds) == {*GROUPS, OTHER}
        has_ttt = name == "quickstart" or name.endswith("with ttt")
        for group in ("TTT operator, forward", "TTT operator, backward"):
            assert (seconds[group] > 0) == has_ttt, name
        assert seconds["matrix products"] > 0
        assert (seconds["optimiser"] == 0) == (name == "layer, base frozen, without ttt")


def test_model_part(report):
    part = report["parts"]["model"]
    talk, training = part["conversation"], part["training"]
    assert set(talk["candidates"]) == {"model", "model with ttt", "codec"}
    assert talk["parameters"]["all"] > talk["parameters"]["base"] and talk["ttt_layers"] == [1, 2]
    seconds = [talk["candidates"][name]["median_seconds"] for name in ("model with ttt", "codec")]
    assert talk["real_time_factor"] == pytest.approx(sum(seconds) / 0.08)
    for candidate in training["candidates"].values():
        # One row of cross entropies is all that the estimate does not know of.
        assert candidate["peak_bytes"] == pytest.approx(candidate["estimated_bytes"], rel=0.1)
        assert candidate["mfu"] is None  # the peak of a CPU is not known
    without, with_ttt = training["candidates"]["lora"], training["candidates"]["lora + ttt"]
    assert with_ttt["trainable_parameters"] > without["trainable_parameters"]
    assert with_ttt["model_flops"] > without["model_flops"]


def test_check_part(report):
    part = report["parts"]["check"]
    assert list(part["candidates"]) == ["without words", "100 words", "500 words"]
    assert all(one["median_seconds"] > 0 for one in part["candidates"].values())


def test_index_part(report):
    part = report["parts"]["index"]
    assert list(part["candidates"]) == ["manifest, headers and words", "index"]


def test_diagnostics_part(report):
    part = report["parts"]["diagnostics"]
    assert set(part) == {"steps_per_call", "candidates"} and part["steps_per_call"] == 10
    assert list(part["candidates"]) == ["never", "every 10th step", "every step"]
    assert all(set(one) == TIMES | {"over_never"} for one in part["candidates"].values())
    assert part["candidates"]["never"]["over_never"] == 1


@pytest.mark.slow
def test_each_candidate_of_the_diagnostics_measures_as_often_as_it_says(monkeypatch):
    counts, measured = [], []
    steps, see = diagnostics._steps, Judge.see

    def counted(*arguments):
        measured.clear()
        steps(*arguments)
        counts.append(len(measured))

    def seen(*arguments):
        measured.append(arguments)
        return see(*arguments)

    monkeypatch.setattr(diagnostics, "_steps", counted)
    monkeypatch.setattr(Judge, "see", seen)
    diagnostics.run(replace(SETTINGS, repetitions=1))
    assert counts == [0, 1, 10, 0, 1, 10]


def test_epoch_part(report):
    part = report["parts"]["epoch"]
    assert set(part) == {
        *("recordings", "audio_seconds", "batches", "batch_size", "candidates", "cold_over_warm"),
    }
    assert set(part["candidates"]) == {"cold", "warm"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["operator", "nonsense"], "nonsense: no such part; there are operator, scaling, streaming"),
        (["--repetitions", "0"], "--repetitions"),
        (["--threads", "many"], "--threads"),
        (["--device", "tpu"], "--device"),
        (["model", "--device", "cpu"], "model: needs a GPU with 80 GB, or --quick"),
        (["--dtype", "float16"], "--dtype"),
        (["--out", "bench.txt"], r"--out: bench.txt must end in \.json"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(arguments))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_the_memory_meter_counts_what_is_alive_at_one_time():
    x = torch.ones(5000, requires_grad=True)  # was there before

    def call():
        a = torch.ones(1000)
        b = a * 2  # 8,000 bytes
        del a
        return torch.cat([b, b])  # 4,000 + 8,000

    assert peak_bytes(call, CPU) == 12_000
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 3 * 20_000  # kept for backward
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 2 * 20_000
    assert peak_bytes(lambda: x.detach().zero_(), CPU) == 0


def test_candidates_take_turns_and_none_is_always_the_first():
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "abc"}, SETTINGS)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(one.seconds) for name, one in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("causal", [True, False])
def test_candidates_that_compute_something_else_are_found(causal):
    size = Size(1, 2, 16, 4, 30)
    inputs = make_inputs(size, CPU, requires_grad=True)
    cotangent = torch.randn(inputs.xq.shape, generator=torch.Generator().manual_seed(1))
    candidates = operators(size, causal=causal, settings=SETTINGS)
    differences = check_equal(candidates, inputs, cotangent)
    assert set(differences) == CANDIDATES - {"scan"}
    wrong = operators(size, causal=not causal, settings=SETTINGS)["autograd"]
    with pytest.raises(UnequalResultsError, match=r"^wrong: outputs differ from those of scan"):
        check_equal({"wrong": wrong} | candidates, inputs, cotangent)


def test_useful_flops_are_those_of_the_forward_pass():
    size = Size(2, 3, 16, 4, 40)
    inputs = make_inputs(size, CPU, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        ttt_mlp(*inputs, mini_batch_size=size.mini_batch_size, backend="autograd")
    assert counter.get_total_flops() == size.forward_flops


def test_a_layer_with_ttt_shares_the_weights_of_the_layer_without():
    stock = make_stock_layer(SETTINGS)
    hybrid = add_ttt(stock, SETTINGS)
    for name, parameter in stock.named_parameters():
        assert hybrid.get_parameter(name) is parameter
    assert not any(parameter.is_meta for parameter in hybrid.parameters())
    x = torch.randn(1, 20, 128)
    hybrid.forward_ssm_gating.closed = True
    torch.testing.assert_close(hybrid(x), stock(x))


def test_straight_line_by_hand():
    assert straight_line([0, 1, 2], [2, 5, 8]) == pytest.approx({"slope": 3, "intercept": 2, "r_squared": 1})
    assert straight_line([0, 1, 2], [0, 1, 0])["r_squared"] == pytest.approx(0)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """All numbers below `value`, each with the nearest key above it."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _records(value: Any) -> Iterator[dict[str, Any]]:
    """All objects with times below `value`."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and "seconds" in value:
        yield value
    for part in parts:
        yield from _records(part)
