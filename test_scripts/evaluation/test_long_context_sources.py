"""Which recordings the long-context evaluation finds, and who speaks in them."""

import json
import os

import pytest

from finetune.errors import DataError
from finetune.evaluation.sources import find_sources, group_sources


def write_manifest(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def names(sources):
    return [source.name for source in sources]


def touch(folder, *paths):
    for name in paths:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folder_tree_is_listed_sorted_without_hidden_names_and_other_files(tmp_path):
    touch(tmp_path, "7/b 2/ü.FLAC", "7/b 2/ü.json", "7/b-1/a.wav", "10/b/c.Opus", "z.ogg", "notes.txt")
    touch(tmp_path, ".hidden/a.wav", "7/.moshi_ttt_codes/a.wav", "7/._a.wav")
    assert names(find_sources(str(tmp_path))) == ["10/b/c.Opus", "7/b 2/ü.FLAC", "7/b-1/a.wav", "z.ogg"]
    assert names(find_sources(str(tmp_path / "z.ogg"))) == ["z.ogg"]


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "data/a/x.wav", "elsewhere/y.wav")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "z.wav").symlink_to(tmp_path / "elsewhere" / "y.wav")
    (tmp_path / "data" / "gone.wav").symlink_to(tmp_path / "nothing")
    assert names(find_sources(str(tmp_path / "data"))) == ["a/x.wav", "gone.wav", "linked/y.wav", "z.wav"]


def test_name_that_is_not_utf8_can_be_printed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.wav", "wb"):
        pass
    assert names(find_sources(str(tmp_path))) == ["\\udcff.wav"]


def test_name_of_two_lines_is_printed_in_one_and_never_taken_for_another(tmp_path):
    touch(tmp_path, "a\nb.wav", "c\x1b[2J.wav")
    sources = find_sources(str(tmp_path))
    assert names(sources) == ["a\\nb.wav", "c\\x1b[2J.wav"]
    assert list(group_sources(sources, "single")) == names(sources)
    touch(tmp_path, "a\\nb.wav")
    with pytest.raises(DataError, match="two recordings are called a"):
        group_sources(find_sources(str(tmp_path)), "single")


def test_manifest_needs_no_word_timings_and_no_duration(tmp_path):
    lines = [{"path": "b.wav", "duration": 2}, {"path": "s/a.wav"}, {"path": str(tmp_path.parent / "c.wav")}]
    sources = find_sources(str(write_manifest(tmp_path / "m.jsonl", lines)))
    assert names(sources) == ["b.wav", "s/a.wav", str(tmp_path.parent / "c.wav")]
    assert [source.duration_sec for source in sources] == [2.0, None, None]
    assert sources[1].alignment_path == tmp_path / "s" / "a.json"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"path": "a.wav", "duration": -1}, r'm\.jsonl line 1: "duration" must be finite and above 0'),
        ({"duration": 1}, r'm\.jsonl line 1: the field "path" is missing'),
        ({"path": "a.wav", "speaker": ["x"]}, r'm\.jsonl line 1: "speaker" must be a name or a number'),
    ],
)
def test_malformed_manifest_names_the_line(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        find_sources(str(write_manifest(tmp_path / "m.jsonl", [line])))


def test_nothing_found_is_one_error(tmp_path):
    touch(tmp_path, "text/a.txt", "m.jsonl")
    with pytest.raises(DataError, match=r"--data: no audio file below the folder .*; name the \.jsonl file"):
        find_sources(str(tmp_path))
    with pytest.raises(DataError, match=r"--data: .*m\.jsonl lists no recordings"):
        find_sources(str(tmp_path / "m.jsonl"))
    with pytest.raises(DataError, match=r"--data: .*none does not exist"):
        find_sources(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"a\.txt is no manifest and no audio file"):
        find_sources(str(tmp_path / "text" / "a.txt"))


def test_speaker_is_the_first_folder_or_what_the_manifest_says(tmp_path):
    touch(tmp_path, "s2/b/2.wav", "s2/b/1.wav", "s2/a/9.wav", "s1/x.wav")
    groups = group_sources(find_sources(str(tmp_path)), "speaker")
    assert {speaker: names(group) for speaker, group in groups.items()} == {
        "s1": ["s1/x.wav"],
        "s2": ["s2/a/9.wav", "s2/b/1.wav", "s2/b/2.wav"],
    }
    lines = [{"path": "s2/b/2.wav"}, {"path": "s1/x.wav", "speaker": 7}, {"path": "s2/a/9.wav"}]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    groups = group_sources(find_sources(str(manifest)), "speaker")
    assert {speaker: names(group) for speaker, group in groups.items()} == {
        "7": ["s1/x.wav"],
        "s2": ["s2/a/9.wav", "s2/b/2.wav"],
    }


def test_unknown_speaker_names_the_file(tmp_path):
    touch(tmp_path, "s1/x.wav", "y.wav")
    with pytest.raises(DataError, match=r"nothing says who speaks in .*y\.wav; put it into a folder"):
        group_sources(find_sources(str(tmp_path)), "speaker")
