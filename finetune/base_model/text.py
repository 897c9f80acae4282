"""The text tokenizer: whether it is the model's own, and what its tokens say."""

import codecs
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from moshi.models.loaders import CheckpointInfo

from finetune.errors import CheckpointError
from finetune.files import read_regular

# Of a model whose configuration does not say.
END_OF_PADDING_ID = 0
_PADDING_ID = 3
_SPACE = "▁"  # how sentencepiece writes a space
_SPECIAL_NAME = re.compile(r"[<\[].+[>\]]")


def load_tokenizer(info: CheckpointInfo, config: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """The text tokenizer.

    Args:
        info: the files of the model.
        config: of the language model, which says how many text tokens it has.

    Raises:
        CheckpointError: the file is not a sentencepiece model, or of another language model.
    """
    tokenizer = read_tokenizer(Path(info.tokenizer))
    advice = "give the model's own tokenizer (moshi_paths.tokenizer_path)"
    num_tokens = config.get("text_card")
    if num_tokens is not None and tokenizer.vocab_size() != num_tokens:
        raise CheckpointError(
            f"{info.tokenizer}: has {tokenizer.vocab_size():,} pieces, the model has {num_tokens:,} text "
            f"tokens (text_card); {advice}."
        )
    problem = padding_problem(tokenizer, config)
    if problem is not None:
        raise CheckpointError(f"{info.tokenizer}: {problem}; {advice}.")
    return tokenizer


def read_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A text tokenizer, whosever it is.

    Raises:
        CheckpointError: the file is not a sentencepiece model.
    """
    try:
        read_regular(path)
        tokenizer = sentencepiece.SentencePieceProcessor(str(path))
        for piece in range(tokenizer.get_piece_size()):
            tokenizer.id_to_piece(piece)  # what is no text shows itself here only
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model: {error}") from None
    return tokenizer


def padding_tokens(config: Mapping[str, Any]) -> dict[int, str]:
    """The text tokens that a model takes for padding, and their uses, by its configuration."""
    return {
        config.get("existing_text_end_padding_id", END_OF_PADDING_ID): "end of padding",
        config.get("existing_text_padding_id", _PADDING_ID): "padding",
    }


def padding_problem(tokenizer: sentencepiece.SentencePieceProcessor, config: Mapping[str, Any]) -> str | None:
    """What keeps a tokenizer from being a model's: words where that has padding; None where nothing does."""
    for token, use in padding_tokens(config).items():
        if token >= tokenizer.vocab_size():
            return f"has {tokenizer.vocab_size():,} pieces, and the model takes token {token} for {use}"
        if not _is_special(tokenizer, token):
            return f"piece {token} is {tokenizer.id_to_piece(token)!r}, which the model takes for {use}"
    return None


def _is_special(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
        return True
    # Symbols that a user defines are pieces like any other, and called `<pad>` or `[PAD]`.
    return not tokenizer.is_byte(token) and bool(_SPECIAL_NAME.fullmatch(tokenizer.id_to_piece(token)))


class TextDecoder:
    """Turns the tokens of a text stream into text, one after the other.

    Args:
        tokenizer: of the model.
        padding: tokens of frames without text.
    """

    def __init__(
        self, tokenizer: sentencepiece.SentencePieceProcessor, *, padding: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._padding = frozenset(padding)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that a token completes.

        Nothing for padding, control and unknown pieces, and for bytes of a character that is not complete:
        they wait for the others, and become U+FFFD where something else follows.
        """
        return self._characters.decode(self._bytes(token))

    def finish(self) -> str:
        """The end: U+FFFD where a character is not complete, else nothing."""
        return self._characters.decode(b"", final=True)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a whole stream, without space around it."""
        self._characters.reset()
        return ("".join(map(self.add, tokens)) + self.finish()).strip()

    def _bytes(self, token: int) -> bytes:
        tokenizer = self._tokenizer
        if token in self._padding or not 0 <= token < tokenizer.vocab_size():
            return b""
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            return b""
        piece = tokenizer.id_to_piece(token)
        if tokenizer.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()
