"""annotate.py with PocketSphinx: words where they are spoken, nothing lost, every fault listed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soxr

from annotation_helpers import (
    SPEAKERS,
    read_wav,
    read_words,
    run_annotate,
    write_transcripts,
    write_wav,
)
from finetune.annotation.aligner import Aligner
from finetune.data.words import load_alignments
from finetune.demo.speech.dialogues import MAIN, USER, Turn, make_dialogue
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.render import Job, render
from finetune.errors import DataError
from project_root import ROOT

POCKETSPHINX = ("--engine", "pocketsphinx")


NAME = "größe 東京 'x'.wav"


SPECIAL = [
    Turn(USER, "Hello, I'd like room 1,250 at 7:30, please.", 0.3),
    Turn(MAIN, "Moshi's zorblax costs 550 euros, that is the 23rd of May 1984.", 0.4),
    Turn(USER, "Thank you, the cafe is 15% cheaper in 2012.", 0.3),
    Turn(MAIN, "Call 0207 for the twenty-first floor.", 0.3),
]


DIALOGUES = {
    NAME: (make_dialogue("v0", duration_sec=20), "en-gb-x-rp+f1"),
    "second.wav": (make_dialogue("v3", duration_sec=20), "en-gb-x-gbclan"),
    "numbers.wav": (SPECIAL, "en-us+f4"),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Recordings of the demo with their transcripts; the times at which words are spoken in `times/`."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "times").mkdir()
    espeak = Espeak()
    for name, (turns, voice) in DIALOGUES.items():
        path = folder / name
        render(espeak, Job(turns, EspeakVoice(voice, 170, 55), path))
        path.with_suffix(".json").rename(folder / "times" / path.with_suffix(".json").name)
        texts = {
            channel: " ".join(turn.text for turn in turns if turn.speaker == speaker)
            for channel, speaker in SPEAKERS.items()
        }
        write_transcripts(path, {channel: as_written(text) for channel, text in texts.items()})
    return folder


def as_written(text: str) -> str:
    """What the synthesiser, which reads ASCII, does not take."""
    return text.replace("cafe", "café").replace(", that", " — that").replace("I'd", "I’d")


@pytest.fixture(scope="module")
def annotated(spoken, tmp_path_factory) -> Path:
    """The same recordings, annotated by two workers from the command line."""
    folder = tmp_path_factory.mktemp("annotated") / "recordings"
    shutil.copytree(spoken, folder)
    result = start(folder, "--workers", "2")
    output, errors = result.communicate(timeout=120)
    assert result.returncode == 0, errors
    assert output == "3 recordings: 3 annotated, 0 skipped (annotated before), 0 rejected\n"
    return folder


@pytest.fixture
def one(spoken, tmp_path) -> Path:
    """A recording that a test may change, alone in its folder."""
    for path in spoken.glob("second.*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "second.wav"


def start(*arguments) -> subprocess.Popen:
    """annotate.py as a process group of its own."""
    command = [sys.executable, "annotate.py", *POCKETSPHINX, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where tests run in the background, they were started with Ctrl-C ignored, which is inherited.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=listen, **pipes)


def is_alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("channel", ["left", "right"])
def test_words_are_placed_where_they_are_spoken(spoken, annotated, name, channel):
    path = (annotated / name).with_suffix(".json")
    found = read_words(path, channel)
    times = read_words(spoken / "times" / path.name, channel)
    written = path.with_suffix(f".{channel}.txt").read_text().split()
    assert [word[0] for word in found] == [word for word in written if word not in ("—", "-")]
    times = [word for word in times if word[0] != "-"]  # a dash is not spoken
    errors = np.abs([one[1] - two[1] for one, two in zip(found, times, strict=True)])
    assert np.median(errors) < 0.025
    assert np.quantile(errors, 0.9) < 0.06
    assert errors.max() < 0.4
    duration_sec = read_wav(annotated / name).shape[1] / 24_000
    assert all(0 <= start_sec < end_sec <= duration_sec for _, start_sec, end_sec in found)


def test_the_files_are_those_that_training_reads(annotated):
    words = load_alignments((annotated / NAME).with_suffix(".json"))
    assert {word.speaker for word in words} == {MAIN, USER}
    content = json.loads((annotated / NAME).with_suffix(".json").read_text())
    starts = [span[0] for _, span, _ in content["alignments"]]
    assert starts == sorted(starts)


def test_silence_shifts_words_and_changes_nothing_else(spoken):
    texts = (spoken / "second.left.txt").read_text()
    aligner = Aligner()
    samples = soxr.resample(read_wav(spoken / "second.wav")[0], 24_000, 16_000)
    plain = aligner.align(samples, texts)
    shifted = aligner.align(np.concatenate([np.zeros(20 * 16_000), samples, np.zeros(16_000)]), texts)
    starts = np.array([word.start_sec for word in plain.words])
    assert np.abs([word.start_sec for word in shifted.words] - starts - 20.0).max() < 0.05


def test_quiet_recordings_are_aligned_as_loud_ones(one, capsys):
    write_wav(one, 0.02 * read_wav(one))
    assert run_annotate(capsys, one.parent, *POCKETSPHINX)[0] == 0


def test_a_recording_at_which_the_search_fails_does_not_spoil_the_next(spoken):
    text = (spoken / "numbers.left.txt").read_text()
    samples = soxr.resample(read_wav(spoken / "numbers.wav")[0], 24_000, 16_000)
    aligner = Aligner()
    expected = aligner.align(samples, text)
    aligner._decoders[0].start_utt()  # so that it cannot be started again
    with pytest.raises(DataError, match="pocketsphinx failed"):
        aligner.align(samples, text)
    assert aligner.align(samples, text) == expected


@pytest.mark.parametrize("fault", ["other", "missing", "extra"])
def test_a_transcript_that_does_not_match_is_rejected(spoken, one, fault, capsys):
    path = one.with_suffix(".left.txt")
    words = path.read_text().split()
    third = len(words) // 3
    others = (spoken / NAME).with_suffix(".left.txt").read_text().split()
    changed = {
        "other": others,
        "missing": words[:third] + words[2 * third :],
        "extra": words[:third] + others[:third] + words[third:],
    }
    path.write_text(" ".join(changed[fault]))
    status, output, _ = run_annotate(capsys, one.parent, *POCKETSPHINX)
    assert status == 1
    summary, rejected = output.splitlines()
    assert summary == "1 recordings: 0 annotated, 0 skipped (annotated before), 1 rejected"
    start_of_reason = f"rejected {one}: left channel: the transcript does not match the recording: "
    assert rejected.startswith(start_of_reason)
    assert not one.with_suffix(".json").exists()


def test_what_is_annotated_is_skipped_and_not_overwritten_unless_asked(one, capsys):
    path = one.with_suffix(".json")
    mine = '{"alignments": [["mine", [0.1, 0.2], "SPEAKER_MAIN"]]}'
    path.write_text(mine)
    status, output, _ = run_annotate(capsys, one.parent, *POCKETSPHINX)
    assert (status, path.read_text()) == (0, mine)
    assert output == "1 recordings: 0 annotated, 1 skipped (annotated before), 0 rejected\n"
    assert run_annotate(capsys, one.parent, *POCKETSPHINX, "--overwrite")[0] == 0
    assert len(read_words(path, "left")) > 20


def test_a_file_in_the_way_is_kept_and_listed(one, capsys):
    path = one.with_suffix(".json")
    path.write_text('["segments"]')
    status, output, _ = run_annotate(capsys, one.parent, *POCKETSPHINX)
    assert (status, path.read_text()) == (1, '["segments"]')
    assert "--overwrite replaces it" in output.splitlines()[1]


def test_what_was_annotated_stays_when_overwriting_fails(one, capsys):
    path = one.with_suffix(".json")
    mine = '{"alignments": [["mine", [0.1, 0.2], "SPEAKER_MAIN"]]}'
    path.write_text(mine)
    one.with_suffix(".left.txt").write_text("something else altogether")
    assert run_annotate(capsys, one.parent, *POCKETSPHINX, "--overwrite")[0] == 1
    assert path.read_text() == mine


def test_transcripts_may_stand_in_the_manifest(one, capsys):
    texts = {}
    for channel in SPEAKERS:
        path = one.with_suffix(f".{channel}.txt")
        texts[channel] = path.read_text()
        path.unlink()
    manifest = one.with_name("train.jsonl")
    manifest.write_text(json.dumps({"path": one.name, "text": texts}) + "\n")
    status, _, _ = run_annotate(capsys, manifest, *POCKETSPHINX)
    assert status == 0
    for channel, text in texts.items():
        found = [word for word, _, _ in read_words(one.with_suffix(".json"), channel)]
        assert found == text.split()


def test_one_channel_alone_needs_its_own_transcript_only(one, capsys):
    one.with_suffix(".right.txt").unlink()
    assert run_annotate(capsys, one.parent, *POCKETSPHINX, "--channels", "left")[0] == 0
    path = one.with_suffix(".json")
    assert read_words(path, "left") and not read_words(path, "right")


def test_a_silent_channel_needs_no_transcript(one, capsys):
    one.with_suffix(".right.txt").unlink()
    samples = read_wav(one)
    samples[1] = 0.0
    write_wav(one, samples)
    assert run_annotate(capsys, one.parent, *POCKETSPHINX)[0] == 0
    path = one.with_suffix(".json")
    assert read_words(path, "left") and not read_words(path, "right")


def test_a_shard_annotates_its_own_recordings_only(spoken, tmp_path, capsys):
    folder = tmp_path / "recordings"
    shutil.copytree(spoken, folder)
    status, output, _ = run_annotate(capsys, folder, *POCKETSPHINX, "--shard", "3/3")
    assert status == 0 and output.startswith("1 recordings: 1 annotated")
    names = sorted(path.name for path in folder.glob("*.wav"))
    assert [path.name for path in folder.glob("*.json")] == [names[2].replace(".wav", ".json")]


BAD = {
    "mono": "mono, it has no right channel; --channels left annotates its voice",
    "unreadable": "cannot be read as audio",
    "empty": "holds no samples",
    "no_transcript": "left channel: no transcript; write what is said into no_transcript.left.txt",
    "empty_transcript": "left channel: the transcript is empty.",
    "foreign": "right channel: 'Привет': 'Пвеирт' is not English",
    "brackets": "left channel: '[laughs]': notes in brackets are not spoken; remove them.",
    "latin1": "is not UTF-8 text",
    "twice": "both say what is said; remove one.",
    "wrong_form": '"text" of the manifest: expected {"left":',
    "silent": "left channel: there is a transcript, but nothing is heard.",
    "too_short": "the transcript does not match the recording",
    "missing": "the file does not exist.",
}


@pytest.fixture(scope="module")
def rejected(spoken, tmp_path_factory):
    """One run over recordings with a fault each and a good one; exit status, output and the folder."""
    folder = tmp_path_factory.mktemp("bad")
    good = read_wav(spoken / "numbers.wav")
    texts = {channel: (spoken / f"numbers.{channel}.txt").read_text() for channel in SPEAKERS}
    entries = []
    for name in (*BAD, "good"):
        path = folder / f"{name}.wav"
        if name != "missing":
            write_wav(path, good)
        if name != "no_transcript":
            write_transcripts(path, texts)
        entries.append({"path": path.name})
    write_wav(folder / "mono.wav", good[:1])
    (folder / "unreadable.wav").write_bytes(b"RIFF of nothing")
    write_wav(folder / "empty.wav", good[:, :0])
    write_transcripts(folder / "empty_transcript.wav", {"left": " \n"})
    write_transcripts(folder / "foreign.wav", {"right": "Hello Привет"})
    write_transcripts(folder / "brackets.wav", {"left": "Hello [laughs] there"})
    (folder / "latin1.left.txt").write_bytes("naïve".encode("latin-1"))
    entries[list(BAD).index("twice")]["text"] = texts
    entries[list(BAD).index("wrong_form")]["text"] = "Hello"
    write_wav(folder / "silent.wav", good * [[0.0], [1.0]])
    write_wav(folder / "too_short.wav", good[:, -48_000:])
    (folder / "all.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = start(folder / "all.jsonl")
    output, errors = result.communicate(timeout=120)
    return result.returncode, output, errors, folder


def test_a_bad_recording_does_not_end_the_others(rejected):
    status, output, errors, folder = rejected
    assert status == 1, errors
    assert output.splitlines()[0] == (
        f"{len(BAD) + 1} recordings: 1 annotated, 0 skipped (annotated before), {len(BAD)} rejected"
    )
    assert [path.name for path in folder.glob("*.json")] == ["good.json"]
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", BAD)
def test_every_fault_is_listed_with_its_reason(rejected, name):
    _, output, _, folder = rejected
    lines = [line for line in output.splitlines() if line.startswith(f"rejected {folder / name}.wav: ")]
    assert len(lines) == 1
    assert BAD[name] in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere",), "nowhere: does not exist; name a folder of recordings or a manifest"),
        ((".",), "no audio file below the folder"),
        (("notes.txt",), "notes.txt: is neither a folder nor a manifest"),
        (("twins",), "would share"),
        (("bad.jsonl",), "line 1: not valid JSON"),
        (("empty.jsonl",), "lists no recordings"),
        (("good", "--shard", "0/2"), "--shard: '0/2' is not I/N with I from 1 to N"),
        (("good", "--shard", "3/2"), "--shard: '3/2' is not I/N"),
        (("good", "--shard", "1"), "--shard: '1' is not I/N"),
        (("good", "--workers", "0"), "--workers: 0 is less than 1"),
        (("good", "--min-score", "nan"), "--min-score: nan is not a score"),
        (("good", "--engine", "ears"), "invalid choice: 'ears'"),
        (("good", "--words"), "unrecognized arguments: --words"),
        ((), "the following arguments are required: SOURCE"),
    ],
)
def test_bad_options_end_with_one_line_and_status_2(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    Path("bad.jsonl").write_text("{")
    Path("empty.jsonl").write_text("\n")
    for name in ("twins/a.wav", "twins/a.flac", "good/a.wav"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    if options == (".",):
        shutil.rmtree("twins")
        shutil.rmtree("good")
    status, output, errors = run_annotate(capsys, *options)
    assert (status, output, len(errors)) == (2, "", 1)
    assert message in errors[0]


def test_a_missing_aligner_names_what_to_install(one, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    status, _, errors = run_annotate(capsys, one.parent, *POCKETSPHINX)
    assert status == 2
    assert errors[-1] == "error: pocketsphinx is not installed: pip install 'moshi-ttt[annotate]'"


def test_interrupted_it_ends_at_once_and_keeps_what_is_done(spoken, tmp_path, capsys):
    for index in range(12):
        for path in spoken.glob("second.*"):
            shutil.copy(path, tmp_path / path.name.replace("second", f"copy_{index:02d}"))
    process = start(tmp_path, "--workers", "2")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "interrupted: what had been saved before is kept."
    assert "Traceback" not in errors
    done = list(tmp_path.glob("*.json"))
    assert 1 <= len(done) < 12
    assert all(load_alignments(path) for path in done)
    while is_alive(process.pid):  # multiprocessing's own tracker takes a moment
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.02)
    times = {path: path.stat().st_mtime_ns for path in done}
    shard = ("--shard", "1/6")  # recordings 0 and 6, one of them done
    assert run_annotate(capsys, tmp_path, *POCKETSPHINX, *shard)[0] == 0
    assert all((tmp_path / f"copy_{index:02d}.json").exists() for index in (0, 6))
    assert {path: path.stat().st_mtime_ns for path in done} == times
