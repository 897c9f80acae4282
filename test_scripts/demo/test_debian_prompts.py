"""Dialogues of Debian's prompts, made of packages that these tests build from synthetic speech."""

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soxr

from annotation_helpers import SPEAKERS, read_wav, read_words
from debian_packages import encode_sound, write_package
from finetune.commands import run_command
from finetune.data.audio.read import read_audio
from finetune.data.recordings.lines import load_manifest
from finetune.demo.debian import package
from finetune.demo.debian.package import read_package
from finetune.demo.debian_prompts.command import debian_prompts
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.word_times import SAMPLE_RATE, speak
from finetune.errors import UserError

SOUNDS, TEXTS = "asterisk-core-sounds-en-g722_1_all.deb", "asterisk-core-sounds-en_1_all.deb"
SMALL = ("--num-train", "2", "--num-eval", "1", "--minutes", "0.3", "--seed", "3")
SPOKEN = {
    "activated": "Activated.",
    "letters/dash": "dash [-]",
    "vm-goodbye": "Goodbye, and thank you for calling.",
    "vm-press": "Please press 1 to listen, or 2 to start again.",
    "vm-busy": "All circuits are busy now.",
    "vm-login": "Agent logged in to extension 1984.",
    "vm-next": "You are next in the queue.",
    "vm-options": "To hear the options again, press the pound key.",
    "vm-tone": "Leave a message after the tone.",
    "vm-wait": "Somebody will be with you in five minutes.",
    "weather": "The weather tomorrow is sunny in the morning.",
    "zombies": "There were no zombies here on Wednesday.",
}
NOT_SPOKEN = {
    "beep": "[this is a beep]",
    "silence/1": "(1 second of silence)",
    "intro": "Hello. (then a tone)",
}
WRONG = {"vm-wrong": "Something else is written here than what was said."}


def encode_g722(samples: np.ndarray) -> bytes:
    """Encode [num_samples] at 16 kHz."""
    return encode_sound(samples, rate=16_000, file_format="g722", codec="g722")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with both packages."""
    folder = tmp_path_factory.mktemp("packages")
    espeak = Espeak()
    sounds = {"usr/share/doc/asterisk-core-sounds-en-g722/copyright": b"License: CC-BY-SA-3.0\n"}
    listing = "; Core Asterisk Sounds in English\n\n"
    for name, text in {**SPOKEN, **NOT_SPOKEN, **WRONG}.items():
        spoken = "Goodbye to all of you." if name in WRONG else text.replace(" [-]", "").strip("[]()")
        speech = speak(espeak, spoken, EspeakVoice("en-us", 160, 45))
        samples = soxr.resample(speech.samples, SAMPLE_RATE, 16_000)
        sounds[f"usr/share/asterisk/sounds/en_US_f_Voice/{name}.g722"] = encode_g722(samples)
        listing += f"{name}: {text}\n"
    listing += "vm-nowhere: This one was never recorded.\n"
    write_package(folder / SOUNDS, sounds)
    texts = {"usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": gzip.compress(listing.encode())}
    write_package(folder / TEXTS, texts)
    return folder


@pytest.fixture(scope="module")
def made(packages, tmp_path_factory) -> Path:
    """The dialogues."""
    folder = tmp_path_factory.mktemp("made") / "prompts"
    assert debian_prompts(["--out", str(folder), "--packages", str(packages), *SMALL]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prompts_in(folder: Path, split: str) -> set[str]:
    """The prompts whose words are found in the dialogues of a set."""
    said = ""
    for recording in load_manifest(folder / "data" / f"{split}.jsonl", key="data"):
        for channel in SPEAKERS:
            said += " ".join(word for word, _, _ in read_words(recording.alignment_path, channel)) + " "
    return {name for name, text in SPOKEN.items() if text.replace(" [-]", "") in said}


def test_training_reads_what_is_made(made):
    for split, count in (("train", 2), ("eval", 1)):
        recordings = load_manifest(made / "data" / f"{split}.jsonl", key="data")
        assert len(recordings) == count
        for recording in recordings:
            assert 18 <= recording.duration_sec < 30
            num_samples = read_audio(recording.path, sample_rate=24_000).shape[1]
            assert num_samples / 24_000 == pytest.approx(recording.duration_sec, abs=0.01)
    assert (made / "copyright").read_text() == "License: CC-BY-SA-3.0\n"


def test_held_out_dialogues_share_no_prompt_with_the_others(made):
    train, held_out = prompts_in(made, "train"), prompts_in(made, "eval")
    assert len(train) >= 6 and held_out
    assert not train & held_out


@pytest.mark.parametrize(("channel", "index"), [("left", 0), ("right", 1)])
def test_words_are_heard_where_their_times_say(made, channel, index):
    for recording in load_manifest(made / "data" / "train.jsonl", key="data"):
        samples = read_wav(recording.path)[index]
        inside = np.zeros(len(samples), dtype=bool)
        words = read_words(recording.alignment_path, channel)
        assert len(words) > 10
        for _, start_sec, end_sec in words:
            inside[round((start_sec - 0.06) * 24_000) : round((end_sec + 0.06) * 24_000)] = True
        assert (samples[~inside] ** 2).sum() < 0.02 * (samples**2).sum()


def test_the_user_is_another_voice_and_slower(made):
    lengths: dict[str, list[float]] = {"left": [], "right": []}
    for recording in load_manifest(made / "data" / "train.jsonl", key="data"):
        for channel, found in lengths.items():
            words = read_words(recording.alignment_path, channel)
            found += [end_sec - start_sec for word, start_sec, end_sec in words if word == "the"]
    assert np.mean(lengths["right"]) > 1.05 * np.mean(lengths["left"])


def test_the_same_seed_gives_the_same_files(made, packages, tmp_path):
    debian_prompts(["--out", str(tmp_path / "again"), "--packages", str(packages), *SMALL])
    assert contents(tmp_path / "again") == contents(made)


def test_what_is_not_spoken_or_does_not_match_is_left_out(packages, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        debian_prompts(["--out", str(tmp_path / "out"), "--packages", str(packages), *SMALL])
    assert f"prompts:    {len(SPOKEN)} of {len(SPOKEN) + 1} aligned" in capsys.readouterr().out
    assert "left out vm-wrong: the transcript does not match the recording" in caplog.text


def test_other_languages_have_estimated_word_times_and_need_no_aligner(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("finetune.demo.debian_prompts.command.Aligner", None)
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)
    spoken = encode_g722(np.concatenate([np.zeros(8_000), tone, np.zeros(8_000)]))
    texts = {f"so-{number}": f"Умер номер {number}." for number in range(11)} | {
        "tone": "[тон]",
        "long": "аб" * 30,
    }
    doc = "usr/share/doc/asterisk-core-sounds-ru"
    listing = "\ufeff; Core\n" + "".join(f"{name}: {text}\n" for name, text in texts.items())
    sounds = {f"usr/share/asterisk/sounds/ru_RU_f_Voice/{name}.g722": spoken for name in texts}
    write_package(
        tmp_path / "asterisk-core-sounds-ru-g722_1_all.deb", sounds | {f"{doc}-g722/copyright": b"CC"}
    )
    write_package(
        tmp_path / "asterisk-core-sounds-ru_1_all.deb",
        {f"{doc}/core-sounds-ru.txt.gz": gzip.compress(listing.encode())},
    )
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        debian_prompts(["--language", "ru", "--out", str(out), "--packages", str(tmp_path), *SMALL])
    printed = capsys.readouterr().out
    assert "prompts:    11 of 12 taken, with estimated word times" in printed
    assert "terms:      CC-BY 3.0" in printed
    assert "left out long: the transcript is too long for the recording" in caplog.text
    words = read_words(out / "data" / "train" / "dialogue_000.json", "left")
    assert [word for word, _, _ in words[:2]] == ["Умер", "номер"]
    assert words[2][2] - words[0][1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / SOUNDS).unlink(),
            "holds no asterisk-core-sounds-en-g722_*.deb; there: apt-get",
        ),
        (lambda folder: (folder / TEXTS).write_bytes(b"PK"), "is no Debian package"),
        (lambda folder: (folder / SOUNDS).write_bytes((folder / SOUNDS).read_bytes()[:9000]), "is damaged"),
        (
            lambda folder: (folder / TEXTS).write_bytes((folder / SOUNDS).read_bytes()),
            "hold no core-sounds-en",
        ),
        (lambda folder: (folder / "out").mkdir(), "exists; remove it or choose another --out"),
        (lambda folder: (folder / SOUNDS.replace("1", "2")).touch(), "holds 2 versions"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line_and_leaves_nothing(
    packages, tmp_path, change, message, capsys
):
    for name in (SOUNDS, TEXTS):
        (tmp_path / name).write_bytes((packages / name).read_bytes())
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: debian_prompts(["--out", str(tmp_path / "out"), "--packages", str(tmp_path)]))
    errors = capsys.readouterr().err.splitlines()
    assert (exit_.value.code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def member(name: str, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def test_links_and_files_that_claim_a_size_are_left_out(tmp_path):
    path = tmp_path / "odd.deb"
    sparse = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50), "GNU.sparse.numblocks": "0"}
    odd = [
        member("./link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("./hard", type=tarfile.LNKTYPE, linkname="etc/passwd"),
        member("./pipe", type=tarfile.FIFOTYPE),
        member("./sparse", pax_headers=sparse),
    ]
    write_package(path, {"../../etc/passwd": b"outside"}, odd)
    assert list(read_package(path)) == [("../../etc/passwd", b"outside")]
    assert list(tmp_path.iterdir()) == [path]


def test_a_package_of_any_size_is_not_taken_into_memory(tmp_path, monkeypatch):
    write_package(tmp_path / "large.deb", {"zeros": bytes(3 << 20)})
    monkeypatch.setattr(package, "_MAX_BYTES", 2 << 20)
    with pytest.raises(UserError, match=r"large\.deb: its files have more than 2 MiB"):
        list(read_package(tmp_path / "large.deb"))


def test_without_dpkg_it_is_said_what_to_install(packages, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="dpkg-deb, which reads Debian's packages, is not here; install dpkg"):
        list(read_package(packages / SOUNDS))


@pytest.mark.parametrize("options", [("--num-train", "0"), ("--minutes", "nan"), ("--minutes", "31")])
def test_bad_options_end_with_status_2(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: debian_prompts(["--out", str(tmp_path / "out"), *options]))
    assert exit_.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_manifest_paths_are_relative(made):
    lines = (made / "data" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [
        "train/dialogue_000.wav",
        "train/dialogue_001.wav",
    ]
