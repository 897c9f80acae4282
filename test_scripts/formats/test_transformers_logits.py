"""Exports in the libraries that they are for, in an environment of its own: the same logits."""

import os
import subprocess

import pytest
import torch
from moshi.models.lm import _delay_sequence
from safetensors.torch import load_file, save_file

from finetune.checkpoint.reading import load_checkpoint_model
from finetune.demo.model_folder import write_random_repository
from finetune.export.formats.folder import export_in_format
from project_root import ROOT
from run_helpers import write_untrained_run

INTERPRETER = "MOSHI_TTT_TRANSFORMERS_PYTHON"
NO_MOSHI = 3  # exit status of transformers_side.py
CONTEXT = 30
TOLERANCE = 1e-5  # of the largest logit, in float32: sums are taken in another order

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        INTERPRETER not in os.environ,
        reason=f"{INTERPRETER} names no interpreter with transformers and peft, which need another "
        "huggingface-hub than moshi",
    ),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["all_heads", "grouped_queries"])
def base(request, tmp_path_factory):
    """A tiny Moshi whose attention sees 30 frames, with as many heads of keys as of queries, or half."""
    kv_repeat = request.param
    folder = tmp_path_factory.mktemp("base") / "model"
    return write_random_repository(folder, context=CONTEXT, kv_repeat=kv_repeat, depformer_kv_repeat=1)


@pytest.fixture(scope="module")
def run(base):
    return write_untrained_run(base.parent / "run", "lora", base)


def other_side(*arguments):
    """Run the other interpreter, which sees none of this one's packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = ROOT / "test_scripts" / "formats" / "transformers_side.py"
    command = [os.environ[INTERPRETER], script, *arguments]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode in (0, NO_MOSHI), done.stderr
    return done.returncode


def compare(folder, checkpoint, *side, num_frames=24):
    """The differences to our logits, relative to the largest: of text [B, T], of audio [B, dep_q, T]."""
    model = load_checkpoint_model(checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.card, (2, 17, num_frames), generator=generator)
    initial = model._get_initial_token().expand(2, -1, -1)
    codes = torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)
    save_file({"codes": codes}, folder / "codes.safetensors")
    if other_side(*side, folder / "codes.safetensors", folder / "logits.safetensors") == NO_MOSHI:
        pytest.skip(f"{INTERPRETER} has no moshi")
    theirs = load_file(folder / "logits.safetensors")
    with torch.no_grad():
        hidden, text = model.forward_text(codes[:, :, :-1])
        audio = model.forward_depformer_training(codes[:, :, 1:], hidden)
    pairs = ((text[:, 0], theirs["text"]), (audio, theirs["audio"]))
    return [((a - b).abs().amax(-1) / a.abs().max()) for a, b in pairs]


def test_a_base_model_has_the_same_logits_in_transformers(base, tmp_path):
    export_in_format("transformers", base, tmp_path / "theirs", dtype="float32")
    for difference in compare(tmp_path, base, "transformers", tmp_path / "theirs"):
        assert difference.max() < TOLERANCE


def test_merged_adapters_have_the_same_logits_in_transformers(run, tmp_path):
    export_in_format("transformers", run, tmp_path / "theirs", dtype="float32")
    for difference in compare(tmp_path, run, "transformers", tmp_path / "theirs"):
        assert difference.max() < TOLERANCE


def test_an_adapter_has_the_same_logits_in_transformers_with_peft(base, run, tmp_path):
    export_in_format("transformers", base, tmp_path / "theirs", dtype="float32")
    export_in_format("peft-transformers", run, tmp_path / "adapter")
    for difference in compare(tmp_path, run, "adapter", tmp_path / "theirs", tmp_path / "adapter"):
        assert difference.max() < TOLERANCE


def test_an_adapter_has_the_same_logits_in_moshi_with_peft(base, run, tmp_path):
    export_in_format("peft", run, tmp_path / "adapter")
    for difference in compare(tmp_path, run, "moshi", base, tmp_path / "adapter"):
        assert difference.max() < TOLERANCE


def test_beyond_the_attention_window_transformers_goes_on_seeing_everything(base, tmp_path):
    """What the documentation says: in a pass, `sliding_window` has no effect."""
    export_in_format("transformers", base, tmp_path / "theirs", dtype="float32")
    for difference in compare(tmp_path, base, "transformers", tmp_path / "theirs", num_frames=2 * CONTEXT):
        assert difference[..., :CONTEXT].max() < TOLERANCE
        assert difference[..., CONTEXT:].min() > TOLERANCE


def test_what_transformers_saves_comes_back_bit_by_bit(base, tmp_path):
    export_in_format("transformers", base, tmp_path / "theirs", dtype="float32")
    other_side("save", tmp_path / "theirs", tmp_path / "saved")
    export_in_format("kyutai", tmp_path / "saved", tmp_path / "ours", base_model=str(base))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
