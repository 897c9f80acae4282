"""Word timings: order and validation."""

import json

import pytest

from finetune.annotation.annotate_file import write_alignments
from finetune.data.words import Word, load_alignments, load_transcript
from finetune.errors import DataError


def test_words_are_sorted_by_start_and_equal_starts_keep_their_order(tmp_path):
    path = tmp_path / "a.json"
    entries = [["c", [2, 3], "S"], ["a", [0.5, 0.4], "SPEAKER_MAIN"], ["b", [0.5, 1], "S"]]
    path.write_text(json.dumps({"alignments": entries, "text_conditions": None}))
    assert load_alignments(path) == [
        Word("a", 0.5, 0.4, "SPEAKER_MAIN"),
        Word("b", 0.5, 1.0, "S"),
        Word("c", 2.0, 3.0, "S"),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('["b", [0, 1]]', r"expected \[\"word\", \[start_sec, end_sec\], \"SPEAKER_MAIN\"\], not \['b'"),
        ('{"b": 1}', "expected .*, not {'b': 1}"),
        ('[5, [0, 1], "S"]', "the word must be a string, not 5"),
        ('["b", 3, "S"]', r"the times must be \[start_sec, end_sec\], not 3"),
        ('["b", [0, 1, 2], "S"]', r"the times must be \[start_sec, end_sec\], not \[0, 1, 2\]"),
        ('["b", [0, 1], null]', "the speaker must be a string, not None"),
        ('["b", ["0", 1], "S"]', "a time must be a number of seconds, not '0'"),
        ('["b", [true, 1], "S"]', "a time must be a number of seconds, not True"),
        ('["b", [NaN, 1], "S"]', "a time must be finite and not negative, not nan"),
        ('["b", [0, Infinity], "S"]', "a time must be finite and not negative, not inf"),
        ('["b", [-0.1, 1], "S"]', r"a time must be finite and not negative, not -0\.1"),
    ],
)
def test_faulty_entry_is_named_with_file_and_index(tmp_path, entry, message):
    path = tmp_path / "a.json"
    path.write_text(f'{{"alignments": [["a", [0, 1], "S"], {entry}]}}')
    with pytest.raises(DataError, match=rf"a\.json: alignments\[1\]: {message}"):
        load_alignments(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", 'a list under "alignments"'),
        (b'{"alignments": {}}', 'a list under "alignments"'),
        (None, "cannot read the word timings"),
    ],
)
def test_unusable_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        load_alignments(path)


def test_text_conditions_are_read_and_outlive_new_word_timings(tmp_path):
    path = tmp_path / "a.json"
    write_alignments(path, {"left": []})
    assert load_transcript(path).text_conditions == {}
    path.write_text(json.dumps({"alignments": [], "text_conditions": {"mood": "calm", "place": ""}}))
    write_alignments(path, {"left": [Word("hi", 0.5, 0.75)]})
    transcript = load_transcript(path)
    assert transcript.text_conditions == {"mood": "calm", "place": ""}
    assert transcript.words == [Word("hi", 0.5, 0.75, "SPEAKER_MAIN")]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("calm", r"text_conditions: expected .*, not 'calm'"),
        ({"mood": None}, "text_conditions: 'mood' must be a string, not None; leave out what is not known"),
        ({"mood": "a\0"}, "text_conditions: the text .* holds characters that no text has"),
        ({"\0": "a"}, "text_conditions: the name .* holds characters that no text has"),
    ],
)
def test_faulty_text_conditions_are_named_with_their_file(tmp_path, conditions, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"alignments": [], "text_conditions": conditions}))
    with pytest.raises(DataError, match=message) as error:
        load_transcript(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
