"""Dialogues of actors, from packages that these tests make: laid out as Fish Fillets, tones for voices."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from annotation_helpers import read_wav, read_words
from debian_packages import encode_sound, write_package
from finetune.commands import run_command
from finetune.data.audio.read import read_audio
from finetune.data.recordings.lines import load_manifest
from finetune.demo.human_dialogues.command import human_dialogues
from finetune.demo.human_dialogues.lua_dialogs import Dialog, read_dialogs, script_order

SOUNDS, SCRIPTS = "fillets-ng-data-cs_1_all.deb", "fillets-ng-data_1_all.deb"
RATE = 22_050
SMALL, BIG, SNAIL = "font_small", "font_big", "font_snail"
CAVE = [
    ("jes-m-tma", SMALL, "Je tu tma."),
    ("jes-v-ano", BIG, "Ano, velká."),
    ("jes-v-vrak0", BIG, "Nultý vrak."),
    ("jes-v-vrak1", BIG, "První vrak."),
    ("jes-m-kam", SMALL, "Kam plavat?"),
    ("jes-s-nic", SNAIL, "Nic nevím."),
    ("jes-v-cas", BIG, "Ještě %1 hodin."),
]
CAVE_CODE = """
    addm(20 + random(30), "jes-m-tma")
    addv(random(10) + 5, "jes-v-vrak"..pom1) -- one of two
    -- addv(3, "jes-v-cas")
    snek:talk("jes-s-nic")
    addm(5, "jes-m-kam")
    addv(9, "jes-v-cas")
"""
SAID_IN_CAVE = [
    ("SPEAKER_MAIN", "Je tu tma."),
    ("SPEAKER_USER", "Ano, velká."),  # not in the code: after the line before it
    ("SPEAKER_USER", "Nultý vrak."),
    ("SPEAKER_MAIN", "Kam plavat?"),
    ("SPEAKER_USER", "První vrak."),  # the second time
]


def voice(text: str, *, rate: int = RATE) -> np.ndarray:
    """A tone for each word, with pauses, and silence at both ends: [num_samples]."""
    parts = [np.zeros(rate // 2)]
    for word in text.split():
        time = np.arange(round(0.06 * len(word) * rate)) / rate
        parts += [0.3 * np.sin(2 * np.pi * 300 * time), np.zeros(round(0.15 * rate))]
    return np.concatenate([*parts, np.zeros(rate // 2)])


def write_lines(lines: list[tuple[str, str, str]]) -> bytes:
    """A `dialogs_cs.lua`."""
    return "\n\n".join(
        f'dialogId("{name}", "{font}", "In English.")\ndialogStr("{text}")' for name, font, text in lines
    ).encode()


def room(
    name: str, lines: list[tuple[str, str, str]], code: str
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Scripts and sounds of a room."""
    scripts = {f"script/{name}/dialogs_cs.lua": write_lines(lines), f"script/{name}/code.lua": code.encode()}
    sounds = {
        f"sound/{name}/cs/{line}.ogg": encode_sound(voice(text), rate=RATE, file_format="flac", codec="flac")
        for line, _, text in lines
    }
    return scripts, sounds


def in_root(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"usr/share/games/fillets-ng/{name}": content for name, content in files.items()}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with both packages: three rooms with dialogues, one in which a fish is alone, and jokes."""
    folder = tmp_path_factory.mktemp("packages")
    scripts, sounds = room("cave", CAVE, CAVE_CODE)
    for name in ("gems", "keys"):
        pair = [(f"{name}-m", SMALL, f"Toto {name}."), (f"{name}-v", BIG, f"Vidím {name}.")]
        more = room(name, pair, f'addv(1, "{name}-v")\naddm(1, "{name}-m")')
        scripts |= more[0]
        sounds |= more[1]
    more = room("steel", [("ste-m", SMALL, "Sama jsem.")], 'addm(1, "ste-m")')
    scripts |= more[0]
    sounds |= more[1]
    jokes = room("share", [("ob-m-vtip", SMALL, "Znáš vtip?"), ("ob-v-ne", BIG, "Neznám.")], "")
    sounds |= {name.replace("share/", "share/borejokes/"): content for name, content in jokes[1].items()}
    scripts["script/share/bore_dialogs_cs.lua"] = jokes[0]["script/share/dialogs_cs.lua"]
    scripts["script/share/level_start.lua"] = (
        b'dialogLoad("script/share/bore_", "sound/share/borejokes/")\naddm(1, "ob-m-vtip") addv(1, "ob-v-ne")'
    )
    sounds["sound/cave/cs/jes-m-pst.ogg"] = b"no text"
    sounds["sound/keys/cs/keys-x.ogg"] = sounds["sound/gems/cs/gems-m.ogg"]
    scripts["script/keys/dialogs_cs.lua"] += (
        b'\ndialogId("keys-x", "font_big", "")\ndialogStr("Rozbit\xc3\xbd.")'
    )
    sounds["sound/keys/cs/keys-x.ogg"] = b"OggS, but damaged"
    notice = {"usr/share/doc/fillets-ng-data-cs/copyright": b"GPL-2\n"}
    write_package(folder / SOUNDS, in_root(sounds) | notice)
    write_package(folder / SCRIPTS, in_root(scripts))
    return folder


def make(out: Path, packages: Path, *options: str) -> int:
    return human_dialogues(["fillets-cs", "--out", str(out), "--packages", str(packages), *options])


@pytest.fixture(scope="module")
def made(packages, tmp_path_factory) -> Path:
    """The dialogues."""
    folder = tmp_path_factory.mktemp("made") / "fillets"
    assert make(folder, packages) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recording_of(folder: Path, name: str) -> Path:
    (path,) = (folder / "data").glob(f"*/{name}.wav")
    return path


def said_in(path: Path) -> list[tuple[str, str]]:
    """Who says which sentence, from the word timings, which are in order of time."""
    said: list[tuple[str, str]] = []
    for word, _, speaker in json.loads(path.with_suffix(".json").read_text())["alignments"]:
        if said and said[-1][0] == speaker and said[-1][1][-1] not in ".?!":
            said[-1] = (speaker, f"{said[-1][1]} {word}")
        else:
            said.append((speaker, word))
    return said


def test_lines_follow_each_other_as_in_the_script_on_the_channel_of_who_says_them(made):
    assert said_in(recording_of(made, "cave")) == SAID_IN_CAVE
    assert said_in(recording_of(made, "gems")) == [
        ("SPEAKER_USER", "Vidím gems."),
        ("SPEAKER_MAIN", "Toto gems."),
    ]
    assert said_in(recording_of(made, "borejokes"))[0] == ("SPEAKER_MAIN", "Znáš vtip?")


def test_training_reads_what_is_made(made):
    sets = {split: load_manifest(made / "data" / f"{split}.jsonl", key="data") for split in ("train", "eval")}
    assert {split: len(recordings) for split, recordings in sets.items()} == {"train": 3, "eval": 1}
    for recording in (*sets["train"], *sets["eval"]):
        num_samples = read_audio(recording.path, sample_rate=24_000).shape[1]
        assert num_samples / 24_000 == pytest.approx(recording.duration_sec, abs=1e-3)
    assert (made / "copyright").read_text() == "GPL-2\n"


@pytest.mark.parametrize(("channel", "index"), [("left", 0), ("right", 1)])
def test_each_word_is_heard_at_its_time_and_nothing_between(made, channel, index):
    path = recording_of(made, "cave")
    samples = read_wav(path)[index]
    inside = np.zeros(len(samples), dtype=bool)
    for word, start_sec, end_sec in read_words(path.with_suffix(".json"), channel):
        span = slice(round((start_sec - 0.03) * 24_000), round((end_sec + 0.03) * 24_000))
        assert (samples[span] ** 2).mean() > 1e-3, word
        inside[span] = True
    assert (samples[~inside] ** 2).sum() < 0.01 * (samples**2).sum()


def test_silence_around_an_utterance_is_cut_off(made):
    samples = read_wav(recording_of(made, "gems"))
    voiced = np.flatnonzero(np.abs(samples).max(axis=0) > 0.05) / 24_000
    longest_pause_sec = np.diff(voiced).max()
    assert longest_pause_sec < 1.2  # of the 1.15 s of silence and a pause of 0.2 s at least
    assert voiced[0] < 1.1


def test_what_is_left_out_is_counted_by_reason(packages, tmp_path, capsys, caplog):
    with caplog.at_level("WARNING"):
        make(tmp_path / "out", packages)
    printed = capsys.readouterr().out
    assert "left out:   1 recordings said by somebody else\n" in printed
    assert "left out:   1 recordings with a number that is filled in\n" in printed
    assert "left out:   1 recordings without a text\n" in printed
    assert "left out:   1 recordings that cannot be used\n" in printed
    assert "words:      22, of which the times of 22 are estimated\n" in printed
    assert "left:       small fish, 0." in printed
    assert "left out keys/keys-x: cannot be decoded (Invalid data found" in caplog.text
    assert "left out the dialogue steel: only one voice is heard in it" in caplog.text


def test_the_other_speaker_can_be_moshi(packages, tmp_path):
    make(tmp_path / "out", packages, "--swap")
    other = {"SPEAKER_MAIN": "SPEAKER_USER", "SPEAKER_USER": "SPEAKER_MAIN"}
    expected = [(other[speaker], text) for speaker, text in SAID_IN_CAVE]
    assert said_in(recording_of(tmp_path / "out", "cave")) == expected


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(made, packages, tmp_path):
    out = tmp_path / "out"
    make(out, packages)
    assert contents(out) == contents(made)
    kept = recording_of(out, "gems")
    before = kept.stat().st_mtime_ns
    lost = recording_of(out, "cave")
    lost.unlink()  # its words were written first
    (lost.parent / ".partial.wav").write_bytes(b"half")
    (out / "data" / "train.jsonl").unlink()
    make(out, packages)
    assert contents(out) == contents(made)
    assert kept.stat().st_mtime_ns == before


def test_another_seed_gives_other_pauses(made, packages, tmp_path):
    make(tmp_path / "out", packages, "--seed", "1")
    one, other = (recording_of(folder, "cave") for folder in (made, tmp_path / "out"))
    assert said_in(one) == said_in(other) and one.read_bytes() != other.read_bytes()


def fails(capsys, *arguments: str) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: human_dialogues(list(arguments)))
    errors = capsys.readouterr().err.splitlines()
    assert (exit_.value.code, len(errors)) == (2, 1)
    return errors[0]


def test_dialogues_of_other_settings_are_not_mixed(made, packages, capsys):
    before = contents(made)
    arguments = ["fillets-cs", "--out", str(made), "--packages", str(packages), "--seed", "2"]
    assert "was made with seed 0, not 2; choose another --out" in fails(capsys, *arguments)
    assert contents(made) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / SOUNDS).write_bytes(b"PK"), "is no Debian package"),
        (lambda folder: (folder / SOUNDS).write_bytes((folder / SOUNDS).read_bytes()[:3000]), "is damaged"),
        (lambda folder: (folder / SCRIPTS).write_bytes((folder / SOUNDS).read_bytes()), "holds no dialogue"),
        (lambda folder: (folder / SOUNDS.replace("1", "2")).touch(), "holds 2 versions"),
    ],
)
def test_packages_that_cannot_be_used_end_with_one_line(packages, tmp_path, change, message, capsys):
    for name in (SOUNDS, SCRIPTS):
        (tmp_path / name).write_bytes((packages / name).read_bytes())
    change(tmp_path)
    arguments = ["fillets-cs", "--out", str(tmp_path / "out"), "--packages", str(tmp_path)]
    assert message in fails(capsys, *arguments)
    assert not list((tmp_path / "out").rglob("*.wav"))


@pytest.mark.parametrize("options", [("--held-out", "1"), ("--held-out", "nan"), ("--seed", "x")])
def test_bad_options_end_with_one_line(options, tmp_path, capsys):
    assert options[0] in fails(capsys, "fillets-cs", "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def apt_get(folder: Path, monkeypatch, script: str) -> None:
    """Put a program of this name first in the search path."""
    tool = folder / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_packages_that_are_not_there_are_downloaded_into_the_folder(made, packages, tmp_path, monkeypatch):
    apt_get(
        tmp_path, monkeypatch, f'for name in "$@"; do cp {packages}/"$name"_*.deb . 2>/dev/null; done; true'
    )
    out = tmp_path / "out"
    assert human_dialogues(["fillets-cs", "--out", str(out)]) == 0
    assert sorted(path.name for path in (out / "packages").iterdir()) == [SOUNDS, SCRIPTS]
    assert contents(out / "data") == contents(made / "data")


def test_a_download_that_fails_ends_with_one_line_and_leaves_no_package(tmp_path, monkeypatch, capsys):
    apt_get(
        tmp_path,
        monkeypatch,
        "touch fillets-ng-data_1_all.deb; echo 'E: Unable to fetch: no network' >&2; exit 100",
    )
    message = fails(capsys, "fillets-cs", "--out", str(tmp_path / "out"))
    assert "cannot download fillets-ng-data-cs fillets-ng-data (Unable to fetch: no network)" in message
    assert "apt-get update" in message
    assert list((tmp_path / "out" / "packages").iterdir()) == []


def test_without_apt_it_is_said_what_to_fetch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("finetune.demo.debian.fetch.shutil.which", lambda name: None)
    message = fails(capsys, "fillets-cs", "--out", str(tmp_path / "out"))
    assert "apt-get, which downloads packages, is not here; put fillets-ng-data-cs fillets-ng-data" in message


def test_comments_and_escapes_of_lua_are_understood():
    script = r"""
    dialogId("a", "font_big", "He said \"no\".")
    dialogStr("Řekl:  \"ne\".")
    -- dialogId("b", "font_big", "x") dialogStr("x")
    dialogId("c", "font_small", "") dialogStr("")
    """
    assert read_dialogs(script) == [Dialog("a", "font_big", 'Řekl: "ne".'), Dialog("c", "font_small", "")]


def test_every_line_is_ordered_once_whatever_the_code_mentions():
    names = ["a0", "a1", "a2", "b", "c", "d1"]
    code = 'talk("c") addm(1, "a"..n) addv(1, "b") addv(2, "c") say("a" .. m) x = "nothing"'
    assert script_order(names, code) == ["c", "d1", "a0", "b", "a1", "a2"]
    assert script_order(names, "") == names
