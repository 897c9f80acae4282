"""`python -m finetune.extend`: what it prints, what it refuses, and that what it makes can be trained."""

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from finetune.extend.command import extend
from finetune.training.run import run_training
from miniatures.extend import JAPANESE, TRANSCRIBER, write_base, write_other_tokenizer
from run_helpers import read_metrics, run_args


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    return write_other_tokenizer(tmp_path_factory.mktemp("tokenizer") / "other.model")


def write_tokenizer(path, **settings):
    """A tokenizer of Japanese."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(JAPANESE * 20),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_it_says_what_it_made(tiny_base, other_tokenizer, tmp_path, command):
    out = tmp_path / "made"
    options = ("--base", tiny_base, "--tokenizer", other_tokenizer, "--predict-user", "--out", out)
    status, output, errors = command(extend, *options)
    assert (status, errors) == (0, [])
    size, vocabulary, steps, made = output.splitlines()
    assert size.endswith("parameters, before 2,123,776")
    assert "text tokens: 480, before 800; kept: " in vocabulary
    assert "260 bytes and control pieces; new: " in vocabulary
    assert steps == "depth transformer: 16 codebooks predicted, before 8"
    assert made == f"made {out}"
    config = json.loads((out / "config.json").read_text())
    base = json.loads((tiny_base / "config.json").read_text())
    assert config == base | {"text_card": 480, "dep_q": 16, "depformer_context": 16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_the_same_seed_makes_the_same_model(tiny_base, other_tokenizer, tmp_path, command):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--base", tiny_base, "--tokenizer", other_tokenizer, "--seed", seed)
        assert command(extend, *options, "--out", tmp_path / name)[0] == 0
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_a_model_with_another_tokenizer_trains(demo, other_tokenizer, tmp_path, command):
    out = tmp_path / "made"
    options = ("--base", demo.model_dir, "--tokenizer", other_tokenizer, "--out", out)
    assert command(extend, *options)[0] == 0
    run_training(run_args(demo, tmp_path / "run", "full_ttt", moshi_paths={"hf_repo_id": str(out)}))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_model_that_predicts_its_user_trains_like_any_other(demo, tmp_path, command):
    out = tmp_path / "made"
    assert command(extend, "--base", demo.model_dir, "--predict-user", "--out", out)[0] == 0
    run_training(run_args(demo, tmp_path / "run", "full_ttt", moshi_paths={"hf_repo_id": str(out)}))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == 3 and losses[-1] < losses[0]


WRONG = {
    "no tokenizer": (["--tokenizer", "none.model"], "--tokenizer: none.model does not exist"),
    "not a tokenizer": (["--tokenizer", "broken.model"], "broken.model: not a sentencepiece model"),
    "no padding": (
        ["--tokenizer", "wordy.model"],
        "which the model takes for padding; train one with unk_id=0, bos_id=1, eos_id=2, pad_id=3.",
    ),
    "spaces behind": (["--tokenizer", "suffix.model"], "puts spaces behind words"),
    "no base": (["--base", "runs/none", "--predict-user"], "runs/none does not exist"),
    "folder exists": (["--predict-user", "--out", "full"], "full exists already"),
    "nothing to do": ([], "--tokenizer FILE, --predict-user or both"),
    "a strange seed": (["--predict-user", "--seed", "x"], "--seed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(tiny_base, tmp_path, monkeypatch, command, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "full").mkdir()
    write_tokenizer(tmp_path / "wordy.model")
    write_tokenizer(tmp_path / "suffix.model", pad_id=3, treat_whitespace_as_suffix=True)
    options, message = WRONG[case]
    before = sorted(tmp_path.rglob("*"))
    status, _, errors = command(extend, "--base", tiny_base, "--out", "made", *options)
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_predicts_its_user_already_is_refused(tiny_base, tmp_path, command):
    made = tmp_path / "made"
    assert command(extend, "--base", tiny_base, "--predict-user", "--out", made)[0] == 0
    status, _, errors = command(extend, "--base", made, "--predict-user", "--out", tmp_path / "again")
    assert status == 2 and len(errors) == 1
    assert "n_q: 16 and dep_q: 16 predicts both voices already" in errors[0]


def test_a_model_that_writes_only_hears_no_user_to_predict(tiny_base, tmp_path, command):
    base = write_base(tmp_path / "base", tiny_base, **TRANSCRIBER)
    status, _, errors = command(extend, "--base", base, "--predict-user", "--out", tmp_path / "made")
    assert status == 2 and len(errors) == 1 and "predicts no voice, it writes text only" in errors[0]


def test_weights_of_another_configuration_are_refused(tiny_base, tmp_path, command):
    base = write_base(tmp_path / "base", tiny_base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    del weights["linears.3.weight"]
    save_file(weights, base / "model.safetensors")
    status, _, errors = command(extend, "--base", base, "--predict-user", "--out", tmp_path / "made")
    assert status == 2 and len(errors) == 1 and "parameters, the file holds" in errors[0]


def test_a_base_model_with_adapters_beside_its_weights_is_refused(tiny_base, tmp_path, command):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    save_file({"x": torch.zeros(1)}, base / "lora.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"lora": True, "lora_name": "lora.safetensors"}
    (base / "config.json").write_text(json.dumps(config))
    status, _, errors = command(extend, "--base", base, "--predict-user", "--out", tmp_path / "made")
    assert status == 2 and len(errors) == 1 and "give a model whose weights are whole" in errors[0]
