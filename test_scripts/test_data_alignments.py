"""Word timings: order and validation."""

import json

import pytest

from finetune.data.alignments import Word, load_alignments
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
