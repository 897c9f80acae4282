"""Spaces between words, as their writing has them, whatever the tokenizer does at the start of a text."""

import io

import pytest
import sentencepiece

from finetune.base_model.text import TextDecoder
from finetune.data.args import TextOptions
from finetune.data.batches.interleaver import count_text, interleave_text
from finetune.data.batches.spelling import spell
from finetune.data.words import Word

SENTENCES = [
    "今日はいい天気ですね。",
    "私はPythonを使います。",
    "電車で3時に行きます。",
    "วันนี้อากาศดี",
    "今天天气很好",
    "hello world how are you",
    "good morning 오늘 날씨가",
]
TEXTS = {
    "Japanese": ["今日", "は", "いい", "天気", "です", "ね", "。"],
    "Japanese with others": ["私", "は", "Python", "を", "3", "時", "に", "使い", "ます", "、", "OK", "？"],
    "Chinese": list("今天天气很好"),
    "Thai": ["วันนี้", "อากาศ", "ดี"],
    "rare characters": ["龘", "今日", "髙", "は"],
}
WITH_SPACES = {"English": ["hello", "world", "good", "zebra"], "Korean": ["오늘", "날씨가", "안녕"]}


@pytest.fixture(
    scope="module",
    params=[(kind, prefix) for kind in ("unigram", "bpe") for prefix in (True, False)],
    ids=lambda param: f"{param[0]}, {'with' if param[1] else 'without'} dummy prefix",
)
def tokenizer(request):
    kind, prefix = request.param
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50),
        model_writer=model,
        model_type=kind,
        add_dummy_prefix=prefix,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def stream_text(tokenizer, texts, *, seconds_per_word=0.05, **options):
    """What a reader of the text stream sees of these words, one after the other."""
    words = [Word(t, i * seconds_per_word, i * seconds_per_word, "SPEAKER_MAIN") for i, t in enumerate(texts)]
    same = {"num_frames": 400, "frame_rate": 12.5, "tokenizer": tokenizer, "options": TextOptions(**options)}
    stream = interleave_text(words, text_padding_id=3, end_of_text_padding_id=0, **same).tolist()
    count = count_text(words, **same)
    assert count.placed == sum(token not in (0, 3) for token in stream)
    assert count.placed == count.tokens or not options
    return TextDecoder(tokenizer, padding=(3, 0)).decode(stream)


@pytest.mark.parametrize("language", TEXTS)
def test_a_language_without_spaces_comes_back_exactly(tokenizer, language):
    text = stream_text(tokenizer, TEXTS[language], keep_and_shift=True)
    assert text == "".join(TEXTS[language]).replace("？", "?")  # as the tokenizer writes it


@pytest.mark.parametrize("language", WITH_SPACES)
def test_a_language_with_spaces_comes_back_exactly(tokenizer, language):
    words = WITH_SPACES[language]
    assert stream_text(tokenizer, words, keep_and_shift=True) == " ".join(words)


def test_words_that_need_more_frames_than_they_have_lose_whole_characters_from_their_end(tokenizer):
    words = TEXTS["rare characters"]
    for seconds in (0.08, 0.16, 0.24, 0.32):
        text = stream_text(tokenizer, words, seconds_per_word=seconds)
        kept = iter("".join(words))
        assert all(char in kept for char in text), text  # in their order, and nothing else
    assert text == "".join(words)


def test_lines_of_a_word_keep_the_spaces_of_their_writing(tokenizer):
    for text, shown in (("今日\nは", "今日は"), ("今日\nOK", "今日OK"), ("hello\nyou", "hello you")):
        tokens = [token for unit in spell(tokenizer, text, spaced=False).units for token in unit]
        assert TextDecoder(tokenizer).decode(tokens) == shown  # this vocabulary has no line break
