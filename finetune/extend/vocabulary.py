"""Another text tokenizer: which rows of the text embeddings and of the text head are kept, and the others.

A row stands for a piece. The embeddings have one more row, the last, for the start of a sequence.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from finetune.base_model.text import padding_problem, padding_tokens, read_tokenizer
from finetune.errors import CheckpointError, ConfigError
from finetune.extend.tensor_file import Plan, PlannedTensor

_TEXT_EMBEDDINGS = ("text_emb.weight", "depformer_text_emb.weight")
_TEXT_HEAD = ("text_linear.weight", "text_linear.bias")
_NEW = -1  # in the place of a row's old number
_TRAIN_ONE = "train one with unk_id=0, bos_id=1, eos_id=2, pad_id=3"


@dataclass(frozen=True)
class Vocabulary:
    """What becomes of the rows of the text vocabulary.

    Attributes:
        rows: for each new piece, the row of the old vocabulary, or -1.
        ordinary: rows of the old vocabulary that stand for text: not for bytes, not for nothing.
        num_old: pieces of the old vocabulary.
        num_text: new pieces with an old row that stand for text; the others are bytes and control pieces.
    """

    rows: tuple[int, ...]
    ordinary: tuple[int, ...]
    num_old: int
    num_text: int

    @property
    def num_pieces(self) -> int:
        """New pieces."""
        return len(self.rows)

    @property
    def num_kept(self) -> int:
        """New pieces with an old row."""
        return sum(row != _NEW for row in self.rows)


def read_new_tokenizer(path: Path, config: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer for a model that was made for another one.

    Args:
        path: of the file.
        config: of the model, which says what it takes for padding.

    Raises:
        ConfigError: there is none, or it puts spaces where a stream cannot use them.
        CheckpointError: it is no tokenizer, or has words in the place of padding.
    """
    if not path.is_file():
        raise ConfigError(f"--tokenizer: {path} does not exist.")
    tokenizer = read_tokenizer(path)
    problem = padding_problem(tokenizer, config)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; {_TRAIN_ONE}.")
    pieces = [tokenizer.id_to_piece(token) for token in tokenizer.encode("a")]
    if pieces and pieces[-1].endswith("▁") and not pieces[0].startswith("▁"):
        raise CheckpointError(
            f"{path}: puts spaces behind words (treat_whitespace_as_suffix), but in the text stream a word "
            "begins with its space; train one that puts them before."
        )
    return tokenizer


def match_vocabularies(
    old: sentencepiece.SentencePieceProcessor,
    new: sentencepiece.SentencePieceProcessor,
    config: Mapping[str, Any],
) -> Vocabulary:
    """Find the old row of every new piece.

    A row is kept where the same text, byte or control piece was there before, for padding and end of padding,
    and for what both tokenizers call unknown, begin and end, whatever its name.

    Args:
        old, new: tokenizers.
        config: of the model.
    """
    known = {_key(old, token): token for token in range(old.vocab_size())}
    keys = [_key(new, token) for token in range(new.vocab_size())]
    rows = [known.get(key, _NEW) for key in keys]
    for role in ("unk_id", "bos_id", "eos_id"):
        token, row = getattr(new, role)(), getattr(old, role)()
        if token >= 0 and row >= 0:
            rows[token] = row
    for token in padding_tokens(config):
        rows[token] = token
    ordinary = tuple(token for (kind, _), token in known.items() if kind == "text")
    texts = set(ordinary)
    return Vocabulary(tuple(rows), ordinary, old.vocab_size(), sum(row in texts for row in rows))


def plan_vocabulary(plan: Plan, vocabulary: Vocabulary, *, seed: int) -> Plan:
    """The tensors of a plan with the rows of a new vocabulary.

    New rows are drawn from the normal distribution with the mean and the covariance of the old rows that
    stand for text, as J-Moshi's were; those of each tensor from `seed` and its name.
    """
    changed = {}
    for name in _TEXT_EMBEDDINGS + _TEXT_HEAD:
        if name in plan:
            rows = vocabulary.rows + ((vocabulary.num_old,) if name in _TEXT_EMBEDDINGS else ())
            old = plan[name]
            make = partial(
                _new_rows, rows=rows, like=vocabulary.ordinary, seed=zlib.crc32(f"{seed}/{name}".encode())
            )
            changed[name] = PlannedTensor(old.source, (len(rows), *old.shape[1:]), old.dtype, make)
    return plan | changed


def vocabulary_config(config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The arguments of `LMModel` with a new vocabulary.

    Raises:
        CheckpointError: the model writes another vocabulary than it reads.
    """
    written = config.get("text_card_out")
    if written not in (None, vocabulary.num_old):
        raise CheckpointError(
            f"--tokenizer: the model writes {written} text tokens (text_card_out) and reads "
            f"{vocabulary.num_old}: which pieces these are is not known."
        )
    size = vocabulary.num_pieces
    return {**config, "text_card": size, **({} if written is None else {"text_card_out": size})}


def _key(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> tuple[str, str]:
    """What a piece stands for: the same text, or byte, has the same key in all tokenizers."""
    piece = tokenizer.id_to_piece(token)
    if tokenizer.is_byte(token):
        return "byte", piece
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return "nothing", piece
    return "text", piece


def _new_rows(old: Tensor, *, rows: Sequence[int], like: Sequence[int], seed: int) -> Tensor:
    """Rows of `old`, and drawn ones where `rows` is -1.

    With the n centred rows `X = Q R`, `R^T R / (n - 1)` is their covariance, also where there are fewer of
    them than dimensions.

    Args:
        old: `[V, D]`, or `[V]`.
        rows: V' rows.
        like: rows whose mean and covariance those that are drawn have.
        seed: of the draw.

    Returns:
        `[V', D]`, or `[V']`, in the dtype of `old`.
    """
    table = old.reshape(len(old), -1)  # a bias has one dimension
    index = torch.tensor(rows)
    new = table[index.clamp(min=0)]
    drawn = (index == _NEW).nonzero()[:, 0]
    if len(drawn):
        known = table[torch.tensor(like)].float()
        mean = known.mean(0)
        factor = torch.linalg.qr(known - mean, mode="r").R
        noise = torch.randn(len(drawn), len(factor), generator=torch.Generator().manual_seed(seed))
        new[drawn] = (mean + noise @ factor / (len(known) - 1) ** 0.5).to(new.dtype)
    return new.reshape(len(rows), *old.shape[1:])
