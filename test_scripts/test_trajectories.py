"""Inner-loop trajectories: the same however a recording is cut, and what is made of them."""

import json
import math

import pytest
import torch

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.cli import run_command
from finetune.errors import ConfigError, DataError
from finetune.evaluation.command import evaluate
from finetune.monitoring.inner_loop_log import InnerLoopLog, read_inner_losses
from finetune.monitoring.plots import _running_mean, plot_trajectories
from finetune.monitoring.trajectories import (
    StreamTrajectories,
    load_trajectories,
    save_trajectories,
    summarise,
    summary_lines,
)
from finetune.monitoring.ttt_metrics import InnerLoopRecorder
from finetune.ttt_integration import apply_ttt_to_model
from moshi_ttt.carry import empty_carry, stack_carries
from moshi_ttt.hybrid_model import set_ttt_mode, ttt_layers
from moshi_ttt.inner_loop import InnerLoop
from moshi_ttt.ops import inner_losses, ttt_mlp_with_states
from moshi_ttt.state_file import StateError
from ttt_inputs import assert_close, make_inputs

C = 4
ARGS = TTTArgs(enable=True, layers="1,3", mini_batch_size=C, initial_gating_alpha=0.5, base_lr=5.0)


def patched(args=ARGS, **overrides):
    lm = make_tiny_lm(**overrides).eval()
    apply_ttt_to_model(lm, args)
    return lm


@pytest.fixture
def lm():
    return patched()


@torch.no_grad()
def one_pass(lm, codes):
    """Losses of one row in one pass outside streaming, by layer, `[3, T]`."""
    recorder = InnerLoopRecorder(lm)
    with recorder.recording():
        lm.forward_text(codes)
    return recorder.trajectories()


@torch.no_grad()
def streamed(lm, codes, size):
    trajectories = StreamTrajectories(lm)
    with lm.streaming(len(codes)), trajectories.recording():
        for part in codes.split(size, 2):
            lm.forward_text(part)
    return trajectories


def assert_same(actual, expected):
    assert actual.keys() == expected.keys() and actual
    for index, losses in expected.items():
        assert_close(actual[index], losses, 1e-9)


# The recorder.


@pytest.mark.parametrize("size", [1, C - 1, C, C + 1, 3 * C + 2, 50])
@pytest.mark.parametrize(
    "settings",
    [{}, {"state_decay": 0.2, "use_rope": True}, {"ttt_mlp_layers": 3, "inner_grad_clip": 0.5}],
    ids=str,
)
def test_chunks_of_any_size_give_the_losses_of_one_pass(size, settings):
    lm = patched(TTTArgs(enable=True, layers="1,3", mini_batch_size=C, base_lr=5.0, **settings))
    codes = make_codes(lm, 2, 23)
    trajectories = streamed(lm, codes, size)
    for row in range(2):
        assert_same(trajectories.losses(row), one_pass(lm, codes[row : row + 1]))


@pytest.mark.parametrize("size", [C - 1, 2 * C, 9])
def test_streaming_gives_the_losses_of_carried_training_chunks(size):
    # Attention starts anew in each training chunk: without its output both see the same frames.
    lm = patched(
        TTTArgs(enable=True, layers="0", mini_batch_size=C, base_lr=5.0), positional_embedding="rope"
    )
    lm.transformer.layers[0].self_attn.out_projs[0].weight.data.zero_()
    codes = make_codes(lm, 1, 30)
    layer = ttt_layers(lm)[0]
    layer.carry, parts = empty_carry(layer.config, batch_size=1, dtype=torch.float64), []
    for part in codes.split(size, 2):
        parts.append(one_pass(lm, part)[0])
        layer.carry = layer.next_carry
    layer.carry = None
    carried = torch.cat(parts, 1)
    assert_same(streamed(lm, codes, 7).losses(), {0: carried})
    assert (carried[0, size:] > carried[1, size:]).double().mean() > 0.5  # W0 is not where the chunk starts


def test_padding_of_a_carried_chunk_has_no_losses_and_its_frames_are_those_of_the_recording():
    # Rows at different places of their mini-batch; only frames that are padding in both are left out.
    lm = patched(
        TTTArgs(enable=True, layers="0", mini_batch_size=C, base_lr=5.0), positional_embedding="rope"
    )
    lm.transformer.layers[0].self_attn.out_projs[0].weight.data.zero_()
    codes, layer = make_codes(lm, 2, 16), ttt_layers(lm)[0]
    codes[0, :, 13:] = codes[1, :, 11:] = lm.zero_token_id
    carries = []
    for row, num_heard in enumerate((6, 3)):
        layer.carry = empty_carry(layer.config, batch_size=1, dtype=torch.float64)
        one_pass(lm, codes[row : row + 1, :, :num_heard])
        carries.append(layer.next_carry)
    layer.carry = stack_carries(carries)
    losses = one_pass(lm, torch.stack([codes[0, :, 6:16], codes[1, :, 3:13]]))[0]
    layer.carry = None
    alone = [one_pass(lm, codes[row : row + 1])[0] for row in range(2)]
    assert_close(losses[:, :7], (alone[0][:, 6:13] + alone[1][:, 3:10]) / 2, 1e-9)
    assert_close(losses[:, 7], alone[1][:, 10], 1e-9)
    assert losses[:, 8:].isnan().all()


def test_losses_may_start_anywhere_in_a_mini_batch():
    inputs = make_inputs(num_tokens=14, requires_grad=False)
    whole = torch.stack(inner_losses(*inputs[1:], mini_batch_size=C))
    for cut in (1, 3, 4, 5, 10):
        _, state = ttt_mlp_with_states(*inputs.cut(0, cut), mini_batch_size=C)
        rest = inner_losses(*inputs.cut(cut, 14)[1:], mini_batch_size=C, start=state)
        assert_close(torch.stack(rest), whole[..., cut:], 1e-12)


def test_rows_may_stand_at_different_places(lm):
    codes = make_codes(lm, 2, 12)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(2), trajectories.recording():
        lm.set_exec_mask(torch.tensor([True, False]))
        for t in range(3):
            lm.forward_text(codes[:, :, t : t + 1])  # row 1 does not hear these
        lm.set_exec_mask(torch.tensor([True, True]))
        lm.forward_text(torch.stack([codes[0, :, 3:], codes[1, :, :9]]))
    assert_same(trajectories.losses(0), one_pass(lm, codes[:1]))
    assert_same(trajectories.losses(1), one_pass(lm, codes[1:, :, :9]))


def test_a_row_that_is_reset_starts_a_new_recording(lm):
    codes = make_codes(lm, 1, 16)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1), trajectories.recording():
        lm.forward_text(codes[:, :, :6])
        lm.reset_streaming()
        lm.forward_text(codes[:, :, 6:])
    first, second = one_pass(lm, codes[:, :, :6]), one_pass(lm, codes[:, :, 6:])
    assert_same(
        trajectories.losses(), {index: torch.cat([first[index], second[index]], 1) for index in first}
    )


def test_memory_that_is_no_longer_finite_is_seen_and_only_where_it_was(lm):
    codes = make_codes(lm, 2, 20)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(2), trajectories.recording():
        lm.forward_text(codes[:, :, :6])
        ttt_layers(lm)[1]._streaming_state.buffers.start_weights[0][1, 0, 0, 1] = torch.nan
        lm.forward_text(codes[:, :, 6:])
    broken = trajectories.losses(1)[1]
    assert broken[1:, 6 : 6 + C].isnan().all() and broken[:, 6 + C :].isfinite().all()
    assert broken[0].isfinite().all()  # W0 is not what broke
    assert broken[0, 6 + C] == broken[1, 6 + C]  # learns from W0 again
    assert trajectories.losses(0)[1].isfinite().all()


def test_padding_has_no_losses(lm):
    codes = make_codes(lm, 1, 15)
    codes[:, :, 7:10] = lm.zero_token_id
    trajectories = streamed(lm, codes, 6)
    losses = trajectories.losses()[3]
    assert (
        losses[:, 7:10].isnan().all() and losses[:, :7].isfinite().all() and losses[:, 10:].isfinite().all()
    )
    assert summarise(losses).num_excluded == 3


def test_nothing_is_computed_when_nothing_records(lm, monkeypatch):
    codes = make_codes(lm, 1, 10)
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1):
        silent, _ = lm.forward_text(codes)
        lm.reset_streaming()
        with trajectories.recording():
            recorded, _ = lm.forward_text(codes)
        assert torch.equal(recorded, silent)
        lm.reset_streaming()

        def fail(*_, **__):
            raise AssertionError("inner losses were computed")

        monkeypatch.setattr(InnerLoop, "losses", fail)
        lm.forward_text(codes)
        with pytest.raises(AssertionError, match="were computed"), trajectories.recording():
            lm.forward_text(codes)
        lm.forward_text(codes)
    assert trajectories.losses()[1].shape == (3, 10)


def test_recordings_follow_one_another_in_a_recorder(lm):
    codes = make_codes(lm, 1, 400)  # longer than the first buffers
    trajectories = StreamTrajectories(lm)
    with torch.no_grad(), lm.streaming(1):
        for part in codes.split(37, 2):
            with trajectories.recording():
                lm.forward_text(part)
    assert_same(trajectories.losses(), one_pass(lm, codes))


@pytest.mark.parametrize("size", [1, C - 1, C, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_fast_weights_gain_nothing_not_even_by_rounding(size, dtype):
    lm = patched(dtype=dtype)
    set_ttt_mode(lm, "frozen")
    for losses in (
        streamed(lm, make_codes(lm, 2, 23), size).losses(1)[1],
        one_pass(lm, make_codes(lm, 1, 23))[1],
    ):
        at_w0, before, after = losses
        assert torch.equal(before, at_w0) and torch.equal(after, at_w0)


def test_closed_gates_hear_nothing(lm):
    codes = make_codes(lm, 1, 10)
    set_ttt_mode(lm, "off")
    assert streamed(lm, codes, 4).losses()[1].shape == (3, 0)


def test_each_step_helps_when_it_is_small(lm):
    summary = summarise(streamed(lm, make_codes(lm, 1, 200), 50).losses()[1])
    assert summary.share_ordered > 0.9 and summary.gain_over_w0 > 5 * summary.gain_per_step > 0


# Summaries.


def test_a_summary_counts_strictly_and_leaves_out_what_is_not_finite():
    nan, inf = math.nan, math.inf
    losses = torch.tensor([[4.0, 4, 4, 4, nan, 4], [4, 3, 3, 5, 3, 3], [3, 2, 3, 4, 2, inf]])
    summary = summarise(losses)
    assert (summary.num_frames, summary.num_excluded) == (4, 2)
    assert summary.share_ordered == 0.25  # the second; the first has before == W0, the third after == before
    assert summary.share_below_w0 == 0.5 and summary.share_step_helps == 0.75
    assert (summary.loss_w0, summary.loss_before, summary.loss_after) == (4, 3.75, 3)
    assert (summary.gain_over_w0, summary.gain_per_step) == (0.25, 0.75)


def test_trends_are_per_1000_frames_and_know_the_frames_left_out():
    frames = torch.arange(5000.0)
    losses = torch.stack([50 + 0 * frames, 40 - 0.002 * frames, 30 - 0.002 * frames])
    losses[:, 1000:2000] = math.nan
    summary = summarise(losses)
    assert summary.trend_before == pytest.approx(-2, rel=1e-4)
    assert summary.trend_gain == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_where_there_is_nothing_to_say_a_summary_has_null(num_frames):
    losses = torch.full((3, num_frames), math.nan)
    if num_frames == 1:
        losses = torch.tensor([[3.0], [2], [1]])
    values = summarise(losses).to_json()
    assert values["trend_before"] is None
    assert values["share_ordered"] == (1.0 if num_frames == 1 else None)
    json.dumps(values, allow_nan=False)


# Files.


def random_losses(num_frames=600):
    torch.manual_seed(0)
    after = torch.rand(num_frames) + 1
    losses = torch.stack([after + 2, after + 0.5, after])
    losses[:, 5] = math.nan
    return {3: losses, 11: losses + 1}


def test_files_give_back_what_was_saved(tmp_path):
    path, losses = tmp_path / "a.safetensors", random_losses()
    save_trajectories(
        path, {11: losses[11].double(), 3: losses[3]}, facts={"checkpoint": "runs/a", "seconds": 48.0}
    )
    loaded = load_trajectories(path)
    assert list(loaded.losses) == [3, 11] and loaded.facts == {"checkpoint": "runs/a", "seconds": 48.0}
    assert all(torch.equal(loaded.losses[i].nan_to_num(-1), losses[i].nan_to_num(-1)) for i in losses)
    save_trajectories(path, losses, facts={})  # replaces its own kind


def test_files_that_are_no_trajectories_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a tensor")
    with pytest.raises(StateError, match="cannot be read as safetensors"):
        load_trajectories(tmp_path / "text.safetensors")
    with pytest.raises(StateError, match="does not exist"):
        load_trajectories(tmp_path / "none.safetensors")
    save_trajectories(tmp_path / "flat.safetensors", {1: torch.zeros(5)}, facts={})
    with pytest.raises(StateError, match=r"layer\.1 \[5\] is no trajectory"):
        load_trajectories(tmp_path / "flat.safetensors")


def write_record(run_dir, steps):
    run_dir.mkdir(exist_ok=True)
    log = InnerLoopLog(run_dir, TTTArgs(enable=True, log_inner_loop_losses=True, inner_loop_log_interval=10))
    for step in steps:
        log.write(step, {index: part + step for index, part in random_losses(48).items()})
    return run_dir / "inner_loop_losses.jsonl"


def test_a_record_of_a_run_is_read_by_its_step(tmp_path):
    path = write_record(tmp_path, [10, 20, 30])
    with path.open("a") as file:
        file.write('{"step": 40, "layers": {"3": [[1.0')  # cut off
    last, second = read_inner_losses(path), read_inner_losses(path, 20)
    assert (last.step, second.step) == (30, 20) and list(last.losses) == [3, 11]
    torch.testing.assert_close(last.losses[11], random_losses(48)[11] + 30, equal_nan=True)
    with pytest.raises(ConfigError, match=r"no record of step 40, only of 10, 20, 30\.$"):
        read_inner_losses(path, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record yet"),
        ("hello\n", "line 1 is not a record"),
        ('{"step": 3, "layers": {"1": [[1.0], [2.0]]}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {"1": [[1.0], [2.0, 1.0], []]}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": 1\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {"-1": [[3.0], [2.0], [1.0]]}}\n', "the record of step 3 is damaged"),
        (f'{{"step": {"9" * 5000}, "layers": {{}}}}\n', "line 1 is not a record"),
    ],
)
def test_damaged_records_are_named(tmp_path, content, message):
    path = tmp_path / "inner_loop_losses.jsonl"
    path.write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        read_inner_losses(path)


# Plots and the command line.


def test_a_running_mean_leaves_out_nan():
    series = torch.tensor([1.0, 2, math.nan, 4, math.nan, math.nan, math.nan]).numpy()
    mean = _running_mean(series, 3)
    assert mean[:5].tolist() == [1.5, 1.5, 3, 4, 4] and all(map(math.isnan, mean[5:]))


def test_plots_of_short_long_and_empty_trajectories(tmp_path):
    for number, num_frames in enumerate((0, 1, 20, 3000)):
        losses = torch.rand(3, num_frames)
        (path,) = plot_trajectories({7: losses}, tmp_path / str(number), title="a")
        assert path.name == "inner_loss_layer_7.png" and path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("what", ["run", "jsonl", "safetensors"])
def test_the_command_prints_a_table_and_writes_plots_and_a_summary(tmp_path, capsys, what):
    run = tmp_path / "run"
    path = write_record(run, [10, 20])
    if what == "safetensors":
        path = run / "long.safetensors"
        save_trajectories(path, random_losses(), facts={"recording": "a.wav"})
    evaluate(["trajectories", str(run if what == "run" else path)])
    out = run / "trajectories" / ("long" if what == "safetensors" else "step_000020")
    names = {"summary.json", "inner_loss_layer_3.png", "inner_loss_layer_11.png"}
    assert {p.name for p in out.iterdir() if p.is_file()} == names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["facts"] == ({"recording": "a.wav"} if what == "safetensors" else {"step": 20})
    assert summary["layers"]["3"]["share_ordered"] == 1 and summary["layers"]["3"]["num_excluded"] == 1
    assert summary["layers"]["11"]["gain_per_step"] == pytest.approx(0.5, rel=1e-5)
    printed = capsys.readouterr().out
    head, *rows = summary_lines({3: summarise(read_inner_losses(run / "inner_loop_losses.jsonl").losses[3])})
    assert head in printed and "100.00%" in printed
    if what != "safetensors":
        assert rows[0] in printed


def test_a_step_and_a_folder_can_be_chosen(tmp_path):
    write_record(tmp_path, [10, 20])
    evaluate(["trajectories", str(tmp_path), "--step", "10", "--out", str(tmp_path / "new" / "out")])
    assert json.loads((tmp_path / "new" / "out" / "summary.json").read_text())["facts"] == {"step": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PATH (see --help)."),
        (["{run}/empty"], "has no inner_loop_losses.jsonl; give a run that was trained with"),
        (["{run}/none.jsonl"], "none.jsonl: does not exist."),
        (["{run}/none.safetensors"], "none.safetensors: does not exist."),
        (["{run}", "--step", "7"], "has no record of step 7, only of 10."),
        (["{run}", "--step", "x"], "argument --step: invalid int value: 'x' (see --help)."),
        (["{run}/a.safetensors", "--step", "7"], "has no steps; leave it out."),
        (["{run}", "--out", "{run}/a.safetensors"], "is a file; give a folder."),
        (["{run}", "--out", ""], "an empty one is no path."),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, arguments, message):
    write_record(tmp_path, [10])
    (tmp_path / "empty").mkdir()
    save_trajectories(tmp_path / "a.safetensors", random_losses(), facts={})
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: evaluate(["trajectories", *(part.format(run=tmp_path) for part in arguments)]))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
