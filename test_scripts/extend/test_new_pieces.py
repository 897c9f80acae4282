"""Rows of pieces: which are kept, and how the others are drawn."""

import io

import pytest
import sentencepiece
import torch

from finetune.extend.tensor_file import PlannedTensor
from finetune.extend.vocabulary import Vocabulary, match_vocabularies, plan_vocabulary
from miniatures.extend import JAPANESE

CONFIG = {"existing_text_padding_id": 3, "text_card_out": None}


def train(**settings):
    """A tokenizer of Japanese, bytes for what it does not know."""
    model = io.BytesIO()
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
    settings = {"vocab_size": 380, "byte_fallback": True} | ids | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(JAPANESE * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def old():
    return train()


def pairs(old, new):
    """New piece and the old one whose row it has, None where it has none."""
    rows = match_vocabularies(old, new, CONFIG).rows
    return {new.id_to_piece(i): old.id_to_piece(row) if row >= 0 else None for i, row in enumerate(rows)}


def test_the_same_tokenizer_keeps_everything_in_its_place(old):
    vocabulary = match_vocabularies(old, old, CONFIG)
    assert vocabulary.rows == tuple(range(old.vocab_size()))
    assert vocabulary.num_kept - vocabulary.num_text == 256 + 4


def test_pieces_are_found_wherever_they_are_and_bytes_too(old):
    new = train(user_defined_symbols=["[SEP]", "<0x7>"], vocab_size=360, shuffle_input_sentence=False)
    found = pairs(old, new)
    same = {piece for piece in found if piece == found[piece]}
    assert {"は", "今", "▁", "<0x00>", "<0xFF>", "<pad>", "<unk>"} <= same
    assert found["[SEP]"] is found["<0x7>"] is None
    assert all(kept in (None, piece) for piece, kept in found.items())


def test_control_pieces_are_found_by_their_use_whatever_their_name(old):
    new = train(unk_piece="[UNK]", bos_piece="[CLS]", eos_piece="[EOS]", pad_piece="[PAD]")
    found = pairs(old, new)
    used = {piece: found[piece] for piece in ("[UNK]", "[CLS]", "[EOS]", "[PAD]")}
    assert used == {"[UNK]": "<unk>", "[CLS]": "<s>", "[EOS]": "</s>", "[PAD]": "<pad>"}


def test_a_text_that_looks_like_a_byte_is_none(old):
    byte = next(token for token in range(old.vocab_size()) if old.is_byte(token))
    new = train(byte_fallback=False, user_defined_symbols=[old.id_to_piece(byte)])
    assert pairs(old, new)[old.id_to_piece(byte)] is None


def drawn(rows, old, *, like, name="text_linear.weight", seed=0):
    """The tensor of a vocabulary."""
    vocabulary = Vocabulary(tuple(rows), tuple(like), len(old), 0)
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[old.dtype]
    plan = plan_vocabulary({name: PlannedTensor(name, tuple(old.shape), dtype)}, vocabulary, seed=seed)
    new = plan[name].make(old)
    assert (tuple(new.shape), new.dtype) == (plan[name].shape, old.dtype)
    return new


def test_new_rows_have_the_mean_and_the_covariance_of_those_that_stand_for_text():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator)
    table = torch.randn(4000, 6, generator=generator) @ mixing + torch.arange(6)
    table[:100] = 1e3  # control pieces, bytes
    new = drawn([-1] * 20000, table, like=range(100, 4000))
    text = table[100:]
    # Standard errors: of a mean 0.02 of a standard deviation, of a covariance about 0.02 of the variances.
    scale = text.std(0)
    assert ((new.mean(0) - text.mean(0)).abs() < 0.05 * scale).all()
    assert ((new.T.cov() - text.T.cov()).abs() < 0.06 * scale[:, None] * scale).all()
    assert (text.T.cov() / (scale[:, None] * scale)).fill_diagonal_(0).abs().max() > 0.3


def test_fewer_rows_than_dimensions_are_enough_to_draw_like_them():
    table = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    new = drawn([0, -1, -1, 4], table, like=range(5))
    assert torch.equal(new[[0, 3]], table[[0, 4]])
    # All that is drawn lies where the rows lie.
    span = torch.linalg.lstsq((table[1:] - table[0]).T, (new[1:3] - table[0]).T)
    torch.testing.assert_close((table[1:] - table[0]).T @ span.solution, (new[1:3] - table[0]).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_draws_the_same_rows_and_another_one_others(dtype):
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows = [*range(50), -1, -1]
    first, again, other = (drawn(rows, table, like=range(4, 50), seed=seed) for seed in (1, 1, 2))
    bias = drawn(rows, table, like=range(4, 50), seed=1, name="text_linear.bias")
    assert torch.equal(first, again)
    assert torch.equal(first[:50], other[:50]) and not torch.equal(first[50:], other[50:])
    assert torch.equal(first[:50], bias[:50]) and not torch.equal(first[50:], bias[50:])


def test_the_start_of_a_sequence_stays_the_last_row_of_embeddings():
    table = torch.arange(6.0)[:, None].repeat(1, 3)  # five pieces and the start
    vocabulary = Vocabulary((0, 3, -1), (3, 4), 5, 1)
    name = "text_emb.weight"
    new = plan_vocabulary({name: PlannedTensor(name, (6, 3), "F32")}, vocabulary, seed=0)[name].make(table)
    assert new[[0, 1, 3], 0].tolist() == [0.0, 3.0, 5.0]


def test_a_bias_of_the_head_is_kept_and_drawn_like_its_rows():
    bias = torch.arange(10.0)
    new = drawn([9, -1, 0], bias, like=range(4, 10), name="text_linear.bias")
    assert new.shape == (3,) and new[[0, 2]].tolist() == [9.0, 0.0]
