"""Text whose words need more tokens than they have frames: what is lost is whole characters, and is said."""

import json

import pytest
import sentencepiece

from faulty_data import line_of, write_good
from finetune.data.args import TextOptions
from finetune.data.batches.interleaver import count_text, interleave_text
from finetune.data.batches.spelling import spell
from finetune.data.check.command import check
from finetune.data.words import Word
from finetune.demo.tokenizer import write_tokenizer
from finetune.errors import DataError
from finetune.training.run import run_training
from run_helpers import run_args

TEXTS = {
    "English": (3, ["good", "morning", "how", "are", "you", "today", "my", "friend"]),
    "French": (3, ["où", "êtes-vous", "allés", "très", "tôt", "à", "l’école"]),
    "Korean": (2, ["안녕하세요", "오늘", "날씨가", "좋네요"]),
    "Chinese": (5, list("今天天气很好我们去公园散步吧")),
    "Japanese": (7, list("おはようございます今日はいい天気ですね")),
    "Thai": (4, ["สวัสดี", "ครับ"]),
    "German": (2, ["Donaudampfschifffahrtsgesellschaftskapitän", "Größe"]),
    "emoji": (6, ["👩‍👩‍👧", "👍🏽", "e\u0301"]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    write_tokenizer(path, seed=0)
    return sentencepiece.SentencePieceProcessor(str(path))


def words_of(language):
    rate, texts = TEXTS[language]
    return [Word(text, i / rate, (i + 0.9) / rate, "SPEAKER_MAIN") for i, text in enumerate(texts)]


def place(tokenizer, words, *, num_frames=200, **options):
    """The text that a reader of the text stream sees, and the count."""
    same = {
        "num_frames": num_frames,
        "frame_rate": 12.5,
        "tokenizer": tokenizer,
        "options": TextOptions(**options),
    }
    stream = interleave_text(words, text_padding_id=3, end_of_text_padding_id=0, **same).tolist()
    tokens = [token for token in stream if token not in (0, 3)]
    count = count_text(words, **same)
    assert count.placed == len(tokens)
    return tokenizer.decode(tokens), count


@pytest.mark.parametrize("language", TEXTS)
def test_no_character_is_cut_however_short_the_recording(tokenizer, language):
    words = words_of(language)
    for num_frames in range(1, 60):
        for shift in (False, True):
            text, count = place(tokenizer, words, num_frames=num_frames, keep_and_shift=shift)
            assert "\ufffd" not in text
            assert count.placed <= count.tokens
    accents = [unit for unit in spell(tokenizer, "xe\u0301y\u0303").units if len(unit) > 1]
    assert all(len(tokenizer.decode(list(unit)).strip()) <= 2 for unit in accents)


@pytest.mark.parametrize("language", TEXTS)
def test_all_text_is_there_with_keep_and_shift(tokenizer, language):
    words = words_of(language)
    text, count = place(tokenizer, words, keep_and_shift=True)
    space = "" if language in ("Chinese", "Japanese", "Thai") else " "
    normal = tokenizer.decode(tokenizer.encode(space.join(word.text for word in words)))
    assert text == normal
    assert count.placed == count.tokens


def test_what_is_cut_is_counted(tokenizer):
    _, count = place(tokenizer, words_of("German"))
    assert (count.words, count.placed < count.tokens) == (2, True)
    _, shifted = place(tokenizer, words_of("German"), keep_and_shift=True)
    assert shifted.tokens == count.tokens == shifted.placed
    assert shifted.late_frames > 0 == count.late_frames


def test_accents_stay_with_their_letter(tokenizer):
    units = [tokenizer.decode(list(unit)) for unit in spell(tokenizer, "ক্ষি").units]
    assert units == ["ক্", "ষি"]


def test_no_space_precedes_words_of_a_language_that_has_none(tokenizer):
    text, _ = place(
        tokenizer, [Word(t, i, i + 0.5, "SPEAKER_MAIN") for i, t in enumerate(["我", "用", "Python", "3月"])]
    )
    assert text == "我用Python3月"


def run_with_words(demo, tmp_path, words, **data):
    folder = tmp_path / "data"
    folder.mkdir()
    entry = json.loads(demo.train_jsonl.read_text().splitlines()[0])
    audio = demo.train_jsonl.parent / entry["path"]
    (folder / "a.wav").symlink_to(audio)
    (folder / "a.json").write_text(json.dumps({"alignments": words}))
    (folder / "m.jsonl").write_text(json.dumps(entry | {"path": "a.wav"}))
    data = {"train_data": str(folder / "m.jsonl"), "num_workers": 0, "cache_dir": str(tmp_path / "c"), **data}
    args = run_args(demo, tmp_path / "run", "full", data=data, max_steps=1, do_ckpt=False)
    run_training(args)


def test_a_run_says_which_share_of_its_text_it_trains_on(demo, tmp_path, logs, caplog):
    words = [["今天天气很好", [0.5, 0.5], "SPEAKER_MAIN"], ["吧", [0.9, 0.9], "SPEAKER_MAIN"]]
    run_with_words(demo, tmp_path, [*words, ["hm", [2, 3], "SPEAKER_USER"], ["ah", [3, 3], "SPEAKER_00"]])
    lines = [line for line in logs(caplog) if "text stream" in line]
    assert len(lines) == 1
    assert "2 words of Moshi, 1 of the user, 1 of unknown speakers ('SPEAKER_00'), which are left" in lines[0]
    assert "28.6 % of 21 text tokens are in the text stream" in lines[0]
    assert "data.keep_and_shift: true" in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"data\.train_data: no words at all in 1 recording, .*data\.text: none"),
        ([["hi", [1, 2], "SPEAKER_00"]], r"none of 1 word is of Moshi .*'SPEAKER_00'.*keep_main_only"),
        ([["hi", [1, 2], "SPEAKER_USER"]], r"none of 1 word is of Moshi .*'SPEAKER_USER'"),
        ([["", [1, 2], "SPEAKER_MAIN"]], r"none of 1 word reaches the text stream"),
    ],
)
def test_a_voiced_data_set_without_any_word_of_moshi_is_an_error(demo, tmp_path, words, message):
    with pytest.raises(DataError, match=message):
        run_with_words(demo, tmp_path, words)
    assert not (tmp_path / "run").exists()


def test_words_of_unknown_speakers_are_trained_on_where_all_are_taken(demo, tmp_path, logs, caplog):
    run_with_words(demo, tmp_path, [["hi", [1, 1], "SPEAKER_00"]], keep_main_only=False)
    assert any("1 word of all speakers; 100 % of" in line for line in logs(caplog))


@pytest.fixture
def check_words(tmp_path, demo, command):
    """Check a recording with these words and the demo's tokenizer; status, output."""

    def run(words, *options):
        write_good(tmp_path, "a").with_suffix(".json").write_text(json.dumps({"alignments": words}))
        (tmp_path / "m.jsonl").write_bytes(line_of("a"))
        tokenizer = demo.model_dir / "tokenizer.model"
        return command(check, tmp_path / "m.jsonl", "--tokenizer", tokenizer, *options)[:2]

    return run


def test_the_check_says_how_much_text_is_cut(check_words):
    words = [["Größe", [0.0, 0.1], "SPEAKER_MAIN"], ["hi", [0.2, 0.4], "SPEAKER_MAIN"]]
    status, output = check_words(words)
    assert status == 0
    assert "text-cut" in output and "keep_and_shift" in output
    assert "2 words of Moshi; 44.4 % of 9 text tokens are in the text stream" in output
    _, output = check_words(words[1:], "--keep-and-shift")
    assert "text-cut" not in output and "1 word of Moshi; 100 % of" in output


def test_the_check_refuses_a_data_set_without_words_unless_none_are_trained_on(check_words):
    status, output = check_words([["hi", [0.2, 0.4], "SPEAKER_00"]])
    assert status == 1
    assert "no-words" in output and "none of 1 word is of Moshi (SPEAKER_MAIN)" in output
    assert check_words([["hi", [0.2, 0.4], "SPEAKER_00"]], "--all-speakers")[0] == 0
    assert check_words([], "--text", "none")[0] == 0


def test_words_that_only_have_a_start_are_right(check_words):
    status, output = check_words([["hi", [0.2, 0.2], "SPEAKER_MAIN"]])
    assert (status, "word-length" in output) == (0, False)
    assert "1 word of Moshi; 100 %" in output
