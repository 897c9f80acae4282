"""Manifests: what is accepted, and the line a user reads otherwise."""

import json

import pytest

from finetune.data.recordings.lines import Recording, load_manifest
from finetune.errors import DataError

KEY = "data.train_data"


def add_recording(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.wav").write_bytes(b"")
    (folder / f"{name}.json").write_text('{"alignments": []}')


def write_lines(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_relative_paths_start_at_the_manifest_and_alignments_lie_beside_the_audio(tmp_path):
    add_recording(tmp_path / "stereo", "a")
    manifest = write_lines(tmp_path / "m.jsonl", {"path": "stereo/a.wav", "duration": 2, "other": None}, "")
    audio = tmp_path / "stereo" / "a.wav"
    assert load_manifest(manifest, key=KEY) == [Recording(audio, 2.0, audio.with_suffix(".json"))]


def test_folder_reads_every_manifest_below_it_in_sorted_order(tmp_path):
    for name in "ab":
        add_recording(tmp_path / name, name)
        write_lines(tmp_path / name / "m.jsonl", {"path": f"{name}.wav", "duration": 1})
    assert [r.path.stem for r in load_manifest(str(tmp_path), key=KEY)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 2: not valid JSON"),
        ([1], r"line 2: a JSON object is needed, not list"),
        ({"duration": 1}, r'line 2: the field "path" is missing'),
        ({"path": "b.wav"}, r'line 2: the field "duration" is missing'),
        ({"path": 3, "duration": 1}, r'line 2: "path" must be a non-empty string, not 3'),
        ({"path": "b.wav", "duration": "1"}, r"line 2: \"duration\" must be a number of seconds, not '1'"),
        ({"path": "b.wav", "duration": True}, r'line 2: "duration" must be a number of seconds, not True'),
        ({"path": "b.wav", "duration": 0}, r'line 2: "duration" must be finite and above 0 seconds, not 0'),
        ('{"path": "b.wav", "duration": NaN}', r'line 2: "duration" must be finite .* not nan'),
        ('{"path": "b.wav", "duration": Infinity}', r'line 2: "duration" must be finite .* not inf'),
        ({"path": "c.wav", "duration": 1}, r"line 2: audio file .*c\.wav does not exist"),
        (
            {"path": "d.wav", "duration": 1},
            r'line 2: word timings .*d\.json do not exist; .*"alignments": \[\[',
        ),
        ({"path": "./a.wav", "duration": 1}, r"line 2: .*a\.wav is already listed \(.*m\.jsonl line 1\)"),
    ],
)
def test_faulty_line_is_named_with_key_file_and_number(tmp_path, line, message):
    add_recording(tmp_path, "a")
    add_recording(tmp_path, "b")
    (tmp_path / "d.wav").write_bytes(b"")
    manifest = write_lines(tmp_path / "m.jsonl", {"path": "a.wav", "duration": 1}, line)
    with pytest.raises(DataError, match=rf"^data\.train_data: .*m\.jsonl {message}") as caught:
        load_manifest(manifest, key=KEY)
    assert "\n" not in str(caught.value)


def test_the_home_of_nobody_is_one_line():
    with pytest.raises(DataError, match=r"^train: ~nobody-of-that-name/a\.jsonl does not exist"):
        load_manifest("~nobody-of-that-name/a.jsonl", key="train")


def test_recording_in_two_manifests_of_a_folder_is_a_duplicate(tmp_path):
    add_recording(tmp_path, "a")
    for name in ("m1.jsonl", "m2.jsonl"):
        write_lines(tmp_path / name, {"path": "a.wav", "duration": 1})
    with pytest.raises(DataError, match=r"m2\.jsonl line 1: .* already listed \(.*m1\.jsonl line 1\)"):
        load_manifest(tmp_path, key=KEY)


def test_links_to_one_file_are_two_recordings(tmp_path):
    add_recording(tmp_path, "a")
    add_recording(tmp_path, "b")
    (tmp_path / "b.wav").unlink()
    (tmp_path / "b.wav").symlink_to(tmp_path / "a.wav")
    lines = [{"path": f"{name}.wav", "duration": 1} for name in "ab"]
    assert len(load_manifest(write_lines(tmp_path / "m.jsonl", *lines), key=KEY)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl does not exist; name a \.jsonl file or a folder"),
        ("missing.jsonl:0.5", r"missing\.jsonl does not exist"),
        ("missing.jsonl,b.jsonl", r"missing\.jsonl does not exist"),
        ("empty.jsonl", r"empty\.jsonl lists no recordings"),
        ("folder", r"no \.jsonl file below the folder"),
        ("notes.txt", r"notes\.txt is not a \.jsonl file"),
        ("binary.jsonl", r"cannot read .*binary\.jsonl as UTF-8 text"),
    ],
)
def test_unusable_source_is_one_line_with_the_key(tmp_path, source, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=rf"^data\.eval_data: .*{message}") as caught:
        load_manifest(f"{tmp_path}/{source}", key="data.eval_data")
    assert "\n" not in str(caught.value)
