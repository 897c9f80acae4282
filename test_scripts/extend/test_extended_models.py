"""Extended models of the real class answer as before with what they kept."""

import json

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_codes
from finetune.args import ModelPaths
from finetune.base_model.locate import find_model_files
from finetune.extend.folder import extend_model
from finetune.extend.vocabulary import match_vocabularies
from finetune.wrapped_model import load_base
from miniatures.extend import (
    TRANSCRIBER,
    load_by_moshi,
    logits_of,
    tokenizer_of,
    write_base,
    write_other_tokenizer,
)

KINDS = {
    "Moshi's": {},
    "shared depth weights": {"depformer_weights_per_step": False, "depformer_multi_linear": False},
    "one projection": {"depformer_multi_linear": False},
    "scheduled": {
        "depformer_weights_per_step_schedule": [0, 1, 2, 2, 3, 3, 3, 3],
        "depformer_dim_feedforward": [66, 48, 48, 33],
    },
    "low rank, norms, biases": {
        "depformer_low_rank_embeddings": 8,
        "norm_emb": True,
        "depformer_norm": "layer_norm",
        "bias_proj": True,
    },
    "grouped queries": {"kv_repeat": 2, "depformer_kv_repeat": 1},
}
TEXT = ("text_emb.weight", "depformer_text_emb.weight", "text_linear.weight")


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    return write_other_tokenizer(tmp_path_factory.mktemp("tokenizer") / "other.model")


@pytest.fixture(scope="module", params=KINDS)
def base(request, tiny_base, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("kind") / "base", tiny_base, **KINDS[request.param])


def kept_of(base, tokenizer):
    """Old and new number of every piece that was kept."""
    new = sentencepiece.SentencePieceProcessor(str(tokenizer))
    config = json.loads((base / "config.json").read_text())
    rows = torch.tensor(match_vocabularies(tokenizer_of(base), new, config).rows)
    kept = (rows >= 0).nonzero()[:, 0]
    assert 300 < len(kept) < len(rows) - 50  # bytes and many pieces of text; others are new
    return rows[kept], kept


def compare(base, extended, *, old=None, new=None):
    """Both models' answers to the same codes, text being written in each one's own tokens."""
    before, after = load_by_moshi(base), load_by_moshi(extended)
    codes = make_codes(before, 2, 12)
    renamed = codes.clone()
    if old is not None:
        index = torch.randint(len(old), codes[:, 0].shape, generator=torch.Generator().manual_seed(3))
        codes[:, 0], renamed[:, 0] = old[index], new[index]
    text, audio = logits_of(before, codes)
    text_after, audio_after = logits_of(after, renamed)
    if old is not None:
        text, text_after = text[..., old], text_after[..., new]
    assert text.abs().max() > 0.5 and (before.dep_q == 0 or audio.abs().max() > 0.5)
    torch.testing.assert_close(text_after, text, atol=1e-6, rtol=0)
    torch.testing.assert_close(audio_after[:, : before.dep_q], audio, atol=1e-6, rtol=0)
    return after


def replace_weights(base, tensors, metadata=None):
    """Another weight file, at a new place of the disk: tensors of the old one are still mapped from there."""
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors", metadata)


def test_another_tokenizer_keeps_the_answers_of_kept_pieces(tiny_base, other_tokenizer, tmp_path):
    extend_model(str(tiny_base), tmp_path / "out", tokenizer=other_tokenizer)
    old, new = kept_of(tiny_base, other_tokenizer)
    model = compare(tiny_base, tmp_path / "out", old=old, new=new)
    assert model.text_card == tokenizer_of(tmp_path / "out").vocab_size()


def test_a_predicted_user_changes_nothing_of_what_moshi_says(tiny_base, tmp_path):
    extend_model(str(tiny_base), tmp_path / "out", predict_user=True)
    assert compare(tiny_base, tmp_path / "out").dep_q == 16


def test_a_model_that_writes_only_keeps_the_answers_of_kept_pieces(tiny_base, other_tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tiny_base, **TRANSCRIBER)
    extend_model(str(base), tmp_path / "out", tokenizer=other_tokenizer)
    old, new = kept_of(base, other_tokenizer)
    assert compare(base, tmp_path / "out", old=old, new=new).depformer is None


def test_both_at_once_keep_both_in_models_of_all_kinds(base, other_tokenizer, tmp_path):
    extend_model(str(base), tmp_path / "out", tokenizer=other_tokenizer, predict_user=True)
    old, new = kept_of(base, other_tokenizer)
    assert compare(base, tmp_path / "out", old=old, new=new).dep_q == 16


def test_the_users_steps_begin_as_moshis_of_the_same_codebook(base, tmp_path):
    extend_model(str(base), tmp_path / "out", predict_user=True)
    model = load_by_moshi(tmp_path / "out")
    own = [name for name in model.state_dict() if name.startswith("linears.")]
    assert len(own) == 16 * (2 if model.linears[0].bias is not None else 1)
    modules = [model.linears, model.depformer_norms, model.depformer_emb[:7] + model.depformer_emb[8:]]
    if len(model.depformer_in) > 1:
        modules.append(model.depformer_in)
    for layer in model.depformer.layers:
        if isinstance(layer.gating, torch.nn.ModuleList):
            modules += [layer.gating, layer.self_attn.in_projs, layer.self_attn.out_projs]
    for parts in modules:
        half = len(parts) // 2
        assert half * 2 == len(parts)
        for first, second in zip(parts[:half], parts[half:], strict=True):
            for name, tensor in first.state_dict().items():
                assert torch.equal(second.state_dict()[name], tensor)
    first, last = model.depformer_emb[0].state_dict(), model.depformer_emb[7].state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())


def test_weights_under_the_names_of_moshis_published_files_are_extended_alike(tiny_base, tmp_path):
    base = write_base(tmp_path / "base", tiny_base)
    extend_model(str(base), tmp_path / "out", predict_user=True)
    tensors = load_file(base / "model.safetensors")
    for layer in (0, 1):
        attention = f"depformer.layers.{layer}.self_attn"
        for kind, joined in (("in", "in_proj_weight"), ("out", "out_proj.weight")):
            parts = [tensors.pop(f"{attention}.{kind}_projs.{step}.weight") for step in range(8)]
            tensors[f"{attention}.{joined}"] = torch.cat(parts)
    replace_weights(base, tensors)
    extend_model(str(base), tmp_path / "published", predict_user=True)
    weights = load_by_moshi(tmp_path / "out").state_dict()
    published = load_by_moshi(tmp_path / "published").state_dict()
    assert weights.keys() == published.keys()
    assert all(torch.equal(weights[name], published[name]) for name in weights)


def test_what_is_not_extended_is_copied_bit_by_bit_in_its_precision(tiny_base, other_tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tiny_base, dtype=torch.bfloat16)
    extend_model(str(base), tmp_path / "out", tokenizer=other_tokenizer, predict_user=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in TEXT)
    for name in ("mimi.safetensors", "mimi_config.json"):
        old, new = base / name, tmp_path / "out" / name
        same = json.loads(old.read_text()) == json.loads(new.read_text()) if name.endswith("json") else None
        assert same or old.read_bytes() == new.read_bytes()


def test_tensors_of_all_widths_and_the_files_own_notes_survive(tiny_base, tmp_path):
    base = write_base(tmp_path / "base", tiny_base)
    tensors = load_file(base / "model.safetensors")
    for name, dtype in (("out_norm.alpha", torch.float64), ("linears.3.weight", torch.bfloat16)):
        tensors[name] = tensors[name].to(dtype)
    replace_weights(base, tensors, {"made": "by hand"})
    extend_model(str(base), tmp_path / "out", predict_user=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert after["linears.11.weight"].dtype == torch.bfloat16
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"made": "by hand"}


def test_an_extended_model_is_found_and_loaded_like_any_other(tiny_base, other_tokenizer, tmp_path):
    extend_model(str(tiny_base), tmp_path / "out", tokenizer=other_tokenizer)
    info = find_model_files(ModelPaths(hf_repo_id=str(tmp_path / "out")))
    model = load_base(info, device="cpu", dtype=torch.float32)
    assert model.text_card == info.get_text_tokenizer().vocab_size()
    # What was made can be extended again, and back.
    own = tiny_base / "tokenizer.model"
    extend_model(str(tmp_path / "out"), tmp_path / "back", tokenizer=own)
    weights, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", tiny_base))
    old, _ = kept_of(tiny_base, other_tokenizer)
    assert all(torch.equal(weights[name][old], first[name][old]) for name in TEXT)
