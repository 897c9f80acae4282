"""A small sentencepiece tokenizer with the special tokens of Moshi's."""

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from finetune.demo.speech.dialogues import make_sentences

VOCAB_SIZE = 800
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

_NUM_SENTENCES = 4000


def write_tokenizer(path: Path, *, seed: int) -> None:
    """Train a tokenizer on generated dialogues and write it.

    Args:
        path: file to write, in sentencepiece's own format.
        seed: of the dialogues, which are not those of the recordings.
    """
    sentences = make_sentences(f"{seed}/tokenizer", count=_NUM_SENTENCES)
    write_tokenizer_of(path, sentences, max_pieces=VOCAB_SIZE)


def write_tokenizer_of(path: Path, sentences: Iterator[str], *, max_pieces: int) -> None:
    """Train a unigram tokenizer with byte fallback and write it.

    Args:
        path: file to write, in sentencepiece's own format.
        sentences: to train on.
        max_pieces: size of the vocabulary; where the sentences hold too little for it, it becomes smaller.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=max_pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
