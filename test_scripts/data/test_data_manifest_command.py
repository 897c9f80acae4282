"""`python -m finetune.data.manifest`: from a folder to a manifest."""

import json
import sys

import pytest

from faulty_data import voices, wav, write_good
from finetune.commands import run_command
from finetune.data.manifest import write_manifest
from finetune.data.recordings.lines import load_manifest


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns the exit status and what was printed."""

    def written(*arguments):
        monkeypatch.setattr(sys, "argv", ["manifest", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command(write_manifest)
        output = capsys.readouterr()
        return caught.value.code, output.out + output.err

    return written


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_files_at_any_depth_are_in_it_sorted(tmp_path, run):
    for name in ("b", "a/z", "a/é", "c/d/e", ".hidden/x", "\udcff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_good(tmp_path, name)
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    write_good(tmp_path, ".hidden-file")
    (tmp_path / "notes.txt").write_text("")
    status, output = run(tmp_path)
    assert status == 0, output
    found = entries(tmp_path / "manifest.jsonl")
    assert [entry["path"] for entry in found] == ["a/z.wav", "a/é.wav", "b.wav", "c/d/e.wav", "\udcff.wav"]
    assert {entry["duration"] for entry in found} == {0.5}
    assert len(load_manifest(tmp_path / "manifest.jsonl", key="data.train_data")) == 5


def test_what_cannot_be_used_is_left_out_with_file_and_reason(tmp_path, run):
    write_good(tmp_path, "good")
    write_good(tmp_path, "alone").with_suffix(".json").unlink()
    write_good(tmp_path, "text").write_bytes(b"no audio")
    (tmp_path / "broken.wav").symlink_to(tmp_path / "nowhere")
    status, output = run(tmp_path, "--jobs", "2")
    assert status == 1
    left_out = [line for line in output.splitlines() if line.startswith("left out ")]
    assert [line.split(": ")[0].rpartition("/")[2] for line in left_out] == [
        "alone.wav",
        "broken.wav",
        "text.wav",
    ]
    assert "has no word timings" in left_out[0]
    assert "cannot be read as audio" in left_out[2]
    assert [entry["path"] for entry in entries(tmp_path / "manifest.jsonl")] == ["good.wav"]


def test_an_older_manifest_is_replaced_on_request_only(tmp_path, run):
    write_good(tmp_path, "a")
    (tmp_path / "manifest.jsonl").write_text("precious\n")
    status, output = run(tmp_path)
    assert status == 2
    assert "--overwrite replaces it" in output
    assert (tmp_path / "manifest.jsonl").read_text() == "precious\n"
    assert run(tmp_path, "--overwrite")[0] == 0
    assert len(entries(tmp_path / "manifest.jsonl")) == 1


def test_a_manifest_elsewhere_leads_to_the_files(tmp_path, run):
    (tmp_path / "data").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    write_good(tmp_path / "data", "a")
    out = tmp_path / "link" / "m.jsonl"
    assert run(tmp_path / "data", "--out", out)[0] == 0
    assert entries(out)[0]["path"] == "../../data/a.wav"
    (recording,) = load_manifest(out, key="data.train_data")
    assert recording.path.samefile(tmp_path / "data" / "a.wav")


@pytest.mark.parametrize("what", ["nothing", "file", "missing", "all left out", "out"])
def test_when_nothing_can_be_written_the_status_is_2(tmp_path, run, what):
    folder, options = tmp_path / "data", []
    if what != "missing":
        folder.mkdir()
    if what == "file":
        folder = write_good(folder, "a")
    if what == "all left out":
        write_good(folder, "a").write_bytes(wav(voices("a")[:, :0]))
    if what == "out":
        write_good(folder, "a")
        options = ["--out", tmp_path / "m.json"]
    status, output = run(folder, *options)
    assert status == 2
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl"))
