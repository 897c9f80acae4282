"""The memory of a conversation as a file: exact, portable, per row, and refused where it does not belong."""

import json
import math
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.commands import run_command
from finetune.memory import memory as memory_command
from finetune.ttt_integration import apply_ttt_to_model
from moshi_ttt import load_ttt_states, save_ttt_states
from moshi_ttt.errors import StateError
from moshi_ttt.files import state_file
from moshi_ttt.hybrid_model import ttt_layers
from moshi_ttt.memory import forget_ttt_states, inspect_ttt_states, list_ttt_states
from ttt_inputs import assert_close

SETTINGS = {
    "enable": True,
    "layers": "1,3",
    "mini_batch_size": 4,
    "initial_gating_alpha": 0.5,
    "base_lr": 5.0,
}


def make_model(*, seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    lm = make_tiny_lm(dtype=dtype).eval()
    apply_ttt_to_model(lm, TTTArgs(**(SETTINGS | settings)))
    return lm


@pytest.fixture
def lm():
    return make_model()


@torch.no_grad()
def hear(lm, codes):
    return torch.cat([lm.forward_text(part)[0] for part in codes.split(1, 2)], 1)


@pytest.fixture
def saved(lm, tmp_path):
    """The memory of two rows after 10 frames, in the middle of a mini-batch."""
    with lm.streaming(2):
        hear(lm, make_codes(lm, 2, 10))
        save_ttt_states(lm, tmp_path / "memory.safetensors")
    return tmp_path / "memory.safetensors"


def layer_inputs(num_frames, batch_size=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_frames, 32, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_a_loaded_memory_gives_the_outputs_of_the_uninterrupted_stream(lm, saved):
    x = layer_inputs(9)
    outputs = []
    for interrupted in (False, True):
        with lm.streaming(2):
            if interrupted:
                load_ttt_states(lm, saved)
            else:
                hear(lm, make_codes(lm, 2, 10))
            outputs.append([layer(x) for layer in ttt_layers(lm).values()])
    for whole, resumed in zip(*outputs, strict=True):
        assert torch.equal(whole, resumed)


@torch.no_grad()
def test_memory_moves_between_precisions_of_the_model(saved):
    single = make_model(dtype=torch.float32)
    double = make_model()
    for target, source in zip(ttt_layers(single).values(), ttt_layers(double).values(), strict=True):
        # W0 that float32 can hold is the same network in both.
        source.load_state_dict({k: v.float().double() for k, v in source.state_dict().items()})
        target.load_state_dict({k: v.float() for k, v in source.state_dict().items()})
    with double.streaming(1), single.streaming(1):
        hear(double, make_codes(double, 1, 10))
        save_ttt_states(double, saved)
        load_ttt_states(single, saved)
        x = layer_inputs(5, 1)
        for a, b in zip(ttt_layers(double).values(), ttt_layers(single).values(), strict=True):
            assert_close(b(x.float()).double(), a(x), 1e-4)


@torch.no_grad()
def test_rows_are_chosen_and_one_row_goes_to_all(lm, saved, tmp_path):
    def states(layer):
        return [part for parts in layer._streaming_state.buffers for part in parts]

    with lm.streaming(2):
        load_ttt_states(lm, saved)
        kept = [part.clone() for part in states(lm.transformer.layers[3].ttt)]
    with lm.streaming(3):
        with pytest.raises(StateError, match="2 rows for a batch of 3"):
            load_ttt_states(lm, saved)
        with pytest.raises(StateError, match="has no row 2, there are 2"):
            load_ttt_states(lm, saved, rows=[0, 1, 2])
        load_ttt_states(lm, saved, rows=[1, 0, 1])
        for now, old in zip(states(lm.transformer.layers[3].ttt), kept, strict=True):
            assert torch.equal(now, old[[1, 0, 1]])
    with lm.streaming(1):
        load_ttt_states(lm, saved, rows=[1])
        save_ttt_states(lm, tmp_path / "one.safetensors")
    with lm.streaming(3):
        load_ttt_states(lm, tmp_path / "one.safetensors")
        for now, old in zip(states(lm.transformer.layers[3].ttt), kept, strict=True):
            assert torch.equal(now, old[[1, 1, 1]])


def test_forgetting_starts_rows_anew_and_leaves_attention_alone(lm):
    x = layer_inputs(5)
    with lm.streaming(2), torch.no_grad():
        hear(lm, make_codes(lm, 2, 10))
        ring = lm.transformer.layers[1].self_attn._streaming_state.kv_cache.end_offset
        forget_ttt_states(lm, torch.tensor([True, False]))
        assert ring.tolist() == [10, 10]
        layer = lm.transformer.layers[1].ttt
        out = layer(x)
    with torch.no_grad():
        fresh = layer(x)
    assert_close(out[0], fresh[0], 1e-12)
    assert not torch.allclose(out[1], fresh[1])


def test_inspect_and_list_say_what_is_there(lm, saved, tmp_path):
    info = inspect_ttt_states(saved)
    assert (info.layers, info.num_frames) == ([1, 3], [10, 10])
    with lm.streaming(2):
        load_ttt_states(lm, saved)
        for index, layer in ttt_layers(lm).items():
            state = layer._streaming_state
            change = [
                (w[1] - w0).square().sum()
                for w, w0 in zip(state.buffers.start_weights, layer.weights, strict=True)
            ]
            expected = (sum(change) / sum(w0.square().sum() for w0 in layer.weights)).sqrt().item()
            assert info.drift[index][1] == pytest.approx(expected)
            assert expected > 0
    (tmp_path / "other.safetensors").write_bytes(b"not a memory")
    assert list_ttt_states(tmp_path) == [info]
    with pytest.raises(StateError, match="is not a folder"):
        list_ttt_states(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1"}, "is the memory of TTT layers 1, 3, this model has them in 1"),
        ({"mini_batch_size": 8}, "mini_batch_size of layer 1 is 4, this model has 8"),
        ({"key_shift": 2}, "key_shift of layer 1 is 1, this model has 2"),
        (
            {"ttt_mlp_expansion_factor": 2.0},
            r"inner_dims of layer 1 is \[8, 32, 8\], this model has \[8, 16, 8\]",
        ),
        ({"seed": 1}, "another checkpoint, the initial fast weights W0 of layer 1 differ"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_the_memory_of_another_model_is_refused_and_says_what_differs(saved, changes, message):
    other = make_model(**changes)
    with other.streaming(2):
        before = other.transformer.layers[1].ttt._streaming_state.buffers.start_weights[0].clone()
        with pytest.raises(StateError, match=message):
            load_ttt_states(other, saved)
        assert torch.equal(other.transformer.layers[1].ttt._streaming_state.buffers.start_weights[0], before)


def _rewrite(path, change_tensors=None, change_identity=None):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change_tensors is not None:
        change_tensors(tensors)
    identity = json.loads(metadata["identity"])
    if change_identity is not None:
        change_identity(identity)
    save_file(tensors, path, {"kind": metadata["kind"], "identity": json.dumps(identity)})


@pytest.mark.parametrize("key_shift", [0, 1])
def test_a_file_from_before_there_was_a_key_shift_fits_models_without_one(tmp_path, key_shift):
    without = make_model(key_shift=0)
    with without.streaming(2):
        hear(without, make_codes(without, 2, 10))
        save_ttt_states(without, tmp_path / "old.safetensors")

    def forget_the_key(identity):
        for layer in identity["layers"].values():
            del layer["key_shift"]

    _rewrite(tmp_path / "old.safetensors", change_identity=forget_the_key)
    model = make_model(key_shift=key_shift)
    with model.streaming(2):
        if key_shift:
            with pytest.raises(StateError, match="key_shift of layer 1 is 0, this model has 1"):
                load_ttt_states(model, tmp_path / "old.safetensors")
        else:
            load_ttt_states(model, tmp_path / "old.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.heard.keys"), "has no tensor layers.1.heard.keys, which this model needs"),
        (lambda t: t.pop("layers.3.offsets"), "has no tensor layers.3.offsets, which this model needs"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra has no place in this model"),
        (
            lambda t: t.update({"layers.1.start_weights.0": torch.zeros(2, 4, 8, 31)}),
            r"layers.1.start_weights.0 has shape \[2, 4, 8, 31\], this model needs \[2, 4, 8, 32\]",
        ),
        (lambda t: t["layers.1.start_biases.0"].fill_(torch.nan), "holds values that are not finite"),
        (lambda t: t.update({"layers.1.offsets": torch.zeros(2, dtype=torch.uint16)}), "has dtype torch.uin"),
        (lambda t: t["layers.1.offsets"].fill_(4), "layers.1.offsets is out of range"),
        (lambda t: t["layers.1.num_tokens"].fill_(-1), "layers.1.num_tokens is out of range"),
        (lambda t: t.update({"layers.1.offsets": torch.zeros(2)}), "offsets has dtype torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "change",
)  # fmt: skip
def test_a_memory_file_with_wrong_tensors_is_refused(lm, saved, change, message):
    _rewrite(saved, change)
    with lm.streaming(2), pytest.raises(StateError, match=message) as error:
        load_ttt_states(lm, saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "identity",
    [{}, {"layers": 3, "num_frames": [1, 2]}, {"layers": {}}, {"num_frames": 1}, {"num_frames": [math.inf]}],
)
def test_a_memory_file_with_a_damaged_identity_is_refused(lm, saved, identity):
    def replace(value):
        value.clear()
        value.update(identity)

    _rewrite(saved, change_identity=replace)
    for use in (inspect_ttt_states, lambda path: load_ttt_states(lm, path)):
        with lm.streaming(2), pytest.raises(StateError, match="what identifies its model is damaged"):
            use(saved)


def test_a_number_that_float32_cannot_hold_is_refused(saved):
    _rewrite(saved, lambda tensors: tensors["layers.1.start_biases.0"].fill_(1e39))
    single = make_model(dtype=torch.float32)
    for target, source in zip(ttt_layers(single).values(), ttt_layers(make_model()).values(), strict=True):
        target.load_state_dict({k: v.float() for k, v in source.state_dict().items()})
    with single.streaming(2), pytest.raises(StateError, match="values that are not finite"):
        load_ttt_states(single, saved)


def test_corrupt_foreign_and_missing_files_are_refused(lm, saved, tmp_path):
    content = saved.read_bytes()
    for number, damaged in enumerate((b"", b"garbage" * 100, content[:50], content[:-1])):
        (tmp_path / f"{number}.safetensors").write_bytes(damaged)
        with lm.streaming(2), pytest.raises(StateError, match="cannot be read as safetensors"):
            load_ttt_states(lm, tmp_path / f"{number}.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="is another safetensors file, not moshi-ttt memory 1"):
        inspect_ttt_states(tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="does not exist"):
        inspect_ttt_states(tmp_path / "nowhere.safetensors")


def test_an_older_file_survives_a_failed_save(lm, saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file, "save_file", full)
    with lm.streaming(2), pytest.raises(StateError, match="cannot be written: No space left"):
        save_ttt_states(lm, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_only_memories_are_replaced_and_links_stay_links(lm, saved, tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "link.safetensors").symlink_to(saved)
    before = saved.stat().st_ino
    with lm.streaming(2):
        with pytest.raises(StateError, match="exists and is not moshi-ttt memory 1"):
            save_ttt_states(lm, tmp_path / "notes.txt")
        save_ttt_states(lm, tmp_path / "link.safetensors")
    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert (tmp_path / "link.safetensors").is_symlink() and saved.stat().st_ino != before
    assert inspect_ttt_states(saved).num_frames == [0, 0]


def test_a_model_that_does_not_stream_or_has_no_ttt_is_a_clear_error(lm, tiny_lm, saved):
    with pytest.raises(ValueError, match="not streaming"):
        save_ttt_states(lm, saved)
    with tiny_lm.streaming(1), pytest.raises(ValueError, match="no TTT layers"):
        load_ttt_states(tiny_lm, saved)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["memory", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_command(memory_command)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_the_command_lists_inspects_and_forgets(command, saved, tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    status, output, _ = command("list", tmp_path)
    assert status == 0
    assert len(output) == 1 and "memory.safetensors" in output[0] and "2 rows" in output[0]
    status, output, _ = command("inspect", saved)
    assert status == 0
    assert "layers: 1, 3" in output
    assert any(line.startswith("row 1: 10 frames (0.8 s)") for line in output)
    status, output, _ = command("forget", saved)
    assert status == 0 and not saved.exists()
    assert output == [f"forgot {saved}"]
    status, _, errors = command("forget", tmp_path / "notes.txt")
    assert status == 2 and "cannot be read as safetensors" in errors[0]
    assert (tmp_path / "notes.txt").exists(), "only memories are deleted"
    assert command("list", tmp_path)[1] == [f"no memory files in {tmp_path}"]
