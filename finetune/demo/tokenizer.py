"""A small sentencepiece tokenizer with the special tokens of Moshi's."""

import io
from pathlib import Path

import sentencepiece

from finetune.demo.speech.dialogues import make_sentences

VOCAB_SIZE = 800
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

_NUM_SENTENCES = 4000


def write_tokenizer(path: Path, *, seed: int) -> None:
    """Train a unigram tokenizer with byte fallback on generated dialogues and write it.

    Args:
        path: file to write, in sentencepiece's own format.
        seed: of the dialogues, which are not those of the recordings.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=make_sentences(f"{seed}/tokenizer", count=_NUM_SENTENCES),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
