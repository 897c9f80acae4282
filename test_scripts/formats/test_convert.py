"""Data sets in the layouts of others: what is converted is heard and said at the same time as before."""

import csv
import gzip
import json

import numpy as np
import pytest
import sphn

from finetune.data.audio.read import read_channels
from finetune.data.convert.command import convert
from finetune.data.recordings.lines import load_manifest
from finetune.data.words import load_alignments

RATE = 8000
WORDS = [
    {"speaker": "A", "word": "hello", "start": 0.46, "end": 1.0},
    {"speaker": "B", "word": "hi", "start": 0.2, "end": 0.4},
]


def tone(duration_sec: float, frequency: float, *voiced: tuple[float, float]) -> np.ndarray:
    """A tone in these stretches of silence, in steps of 16 bits: [num_samples]."""
    time = np.arange(round(duration_sec * RATE)) / RATE
    on = sum((time >= start) & (time < end) for start, end in voiced)
    return (np.round(8000 * on * np.sin(2 * np.pi * frequency * time)) / 2**15).astype(np.float32)


def write_wav(path, *voices: np.ndarray) -> np.ndarray:
    """Write voices side by side; returns what is in the file, [channels, num_samples]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sphn.write_wav(str(path), np.stack(voices).squeeze(), RATE)
    return read_channels(path, sample_rate=RATE)


def samples_of(path) -> np.ndarray:
    return read_channels(path, sample_rate=RATE)


def write_dialogue(folder, name="d1", words=WORDS, text="text", audio="audio") -> np.ndarray:
    samples = write_wav(folder / audio / f"{name}.wav", tone(2, 300, (0.46, 1.0)), tone(2, 500, (0.2, 0.4)))
    (folder / text).mkdir(exist_ok=True)
    (folder / text / f"{name}.json").write_text(json.dumps(words))
    return samples


def cut(folder, *, channel=0, kind="MonoCut", start=0.5, duration=1.0, **changes):
    """A cut of a stereo recording in which `one` is said from 0.6 s on, left, and `two` from 1.6 s on."""
    supervision = {
        "id": "s1",
        "recording_id": "r",
        "start": 0.1,
        "duration": 1.4,
        "channel": 0,
        "text": "one two",
        "speaker": "ann",
        "alignment": {
            "word": [["one", 0.6, 0.3], ["", 0.9, 0.7], {"symbol": "two", "start": 1.6, "duration": 0.3}]
        },
    }
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0, 1], "source": str(folder / "r.wav")}],
        "sampling_rate": RATE,
        "num_samples": 2 * RATE,
        "duration": 2.0,
    }
    fields = {
        "id": "r-0",
        "start": start,
        "duration": duration,
        "channel": channel,
        "supervisions": [supervision],
        "recording": recording,
        "type": kind,
    }
    return fields | changes


def write_cuts(folder, *cuts, name="cuts.jsonl"):
    samples = write_wav(folder / "r.wav", tone(2, 300, (0.6, 0.9), (1.6, 1.9)), tone(2, 500, (1.0, 1.4)))
    lines = "".join(json.dumps(fields) + "\n" for fields in cuts)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(folder / name, "wt") as file:
        file.write(lines)
    return folder / name, samples


def write_folder(folder, rows, columns=("file_name", "text")):
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return folder


@pytest.mark.parametrize(("text", "audio"), [("text", "audio"), (".", ".")])
def test_a_dialogue_of_j_moshi_keeps_its_samples_and_words(tmp_path, command, text, audio):
    source = tmp_path / "in"
    source.mkdir()
    samples = write_dialogue(source, text=text, audio=audio)
    status, output, _ = command(convert, "j-moshi", source, "--out", tmp_path / "out")
    assert status == 0 and "1 recordings, 0.00 h; 1 converted, 0 there before; 0 left out" in output
    (recording,) = load_manifest(tmp_path / "out" / "manifest.jsonl", key="data")
    assert recording.duration_sec == 2.0
    assert np.array_equal(samples_of(recording.path), samples)
    words = [
        (word.text, word.start_sec, word.end_sec, word.speaker)
        for word in load_alignments(recording.alignment_path)
    ]
    assert words == [("hi", 0.2, 0.4, "SPEAKER_USER"), ("hello", 0.46, 1.0, "SPEAKER_MAIN")]


def test_b_becomes_moshi_with_both_channels_changed(tmp_path, command):
    samples = write_dialogue(tmp_path)
    assert command(convert, "j-moshi", tmp_path, "--out", tmp_path / "out", "--moshi", "B")[0] == 0
    path = tmp_path / "out" / "audio" / "d1.wav"
    assert np.array_equal(samples_of(path), samples[::-1])
    assert [word.speaker for word in load_alignments(path.with_suffix(".json"))] == [
        "SPEAKER_MAIN",
        "SPEAKER_USER",
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({}, r'expected a list of {"speaker", "word", "start", "end"}.'),
        (
            [WORDS[0], WORDS[1] | {"speaker": "C"}],
            "entry 2: \"speaker\" must be A, the left channel, or B, not 'C'.",
        ),
        ([WORDS[0] | {"word": " "}], "entry 1: \"word\" must be a text that is not empty, not ' '."),
        ([WORDS[0] | {"start": -1}], 'entry 1: "start" must be a number of seconds from 0 on, not -1.'),
        ([WORDS[0] | {"end": None}], 'entry 1: "end" must be a number of seconds from 0 on, not None.'),
        (["hello"], 'entry 1: expected {"speaker", "word", "start", "end"}.'),
        ([WORDS[0] | {"start": 2.0}], "1 of 1 words lie behind the end of the audio, 2.00 s."),
    ],
)
def test_a_faulty_dialogue_is_named_and_left_out(tmp_path, command, words, reason):
    write_dialogue(tmp_path)
    write_dialogue(tmp_path, "d2", words)
    status, output, _ = command(convert, "j-moshi", tmp_path, "--out", tmp_path / "out")
    assert status == 1
    assert output.splitlines()[0] == f"left out {tmp_path / 'text' / 'd2.json'}: {reason}"
    assert len(load_manifest(tmp_path / "out" / "manifest.jsonl", key="data")) == 1
    assert not list((tmp_path / "out" / "audio").glob("d2.*"))


def test_audio_without_words_and_words_without_audio_are_named(tmp_path, command):
    write_dialogue(tmp_path)
    write_dialogue(tmp_path, "d2")
    (tmp_path / "audio" / "d2.wav").rename(tmp_path / "audio" / "d3.wav")
    status, output, _ = command(convert, "j-moshi", tmp_path, "--out", tmp_path / "out")
    assert status == 1 and "d2.json: no audio file of this name" in output
    assert "d3.wav: has no words" in output


def test_a_second_run_keeps_what_is_there_and_converts_what_changed(tmp_path, command):
    for name in ("d1", "d2"):
        write_dialogue(tmp_path, name)
    arguments = ("j-moshi", tmp_path, "--out", tmp_path / "out")
    command(convert, *arguments)
    timings = tmp_path / "out" / "audio" / "d1.json"
    mine = json.loads(timings.read_text()) | {"text_conditions": {"mood": "calm"}}
    timings.write_text(json.dumps(mine))
    write_dialogue(tmp_path, "d2", WORDS[:1])
    assert "1 converted, 1 there before" in command(convert, *arguments)[1]
    assert json.loads(timings.read_text()) == mine, "what was added by hand stays"
    assert [word.text for word in load_alignments(timings.with_name("d2.json"))] == ["hello"]
    timings.unlink()  # as after a kill between the two files
    assert "1 converted, 1 there before" in command(convert, *arguments)[1]


def test_a_folder_of_something_else_is_refused(tmp_path, command):
    write_dialogue(tmp_path)
    out = tmp_path / "out"
    command(convert, "j-moshi", tmp_path, "--out", out)
    status, _, (line,) = command(convert, "j-moshi", tmp_path, "--out", out, "--moshi", "B")
    assert status == 2 and line == f"error: {out}: was made with moshi 'A', not 'B'; choose another --out."
    status, _, (line,) = command(convert, "j-moshi", tmp_path, "--out", tmp_path / "text")
    assert status == 2 and "text: exists and was not made by this command" in line
    status, _, (line,) = command(convert, "j-moshi", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert status == 2 and line.endswith("nowhere: does not exist.") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_the_times_of_a_cut_count_from_its_start(tmp_path, command, name):
    cuts, samples = write_cuts(tmp_path, cut(tmp_path), name=name)
    status, output, _ = command(convert, "lhotse", cuts, "--out", tmp_path / "out")
    assert status == 0 and "1 words lie outside their cuts and are left out." in output
    assert "1 recordings are mono: train with data.mono" in output
    path = tmp_path / "out" / "audio" / "r-0.wav"
    assert np.array_equal(samples_of(path), samples[:1, RATE // 2 : 3 * RATE // 2])
    ((word, start, end, speaker),) = load_alignments(path.with_suffix(".json"))
    assert (word, start, end, speaker) == ("one", 0.1, 0.4, "SPEAKER_MAIN")
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": "audio/r-0.wav", "duration": 1.0, "speaker": "ann"}


@pytest.mark.parametrize("moshi", [None, 1])
def test_of_a_cut_with_two_channels_one_becomes_moshi(tmp_path, command, moshi):
    cuts, samples = write_cuts(
        tmp_path, cut(tmp_path, channel=[0, 1], kind="MultiCut", start=0, duration=2.0)
    )
    options = [] if moshi is None else ["--moshi-channel", moshi]
    assert command(convert, "lhotse", cuts, "--out", tmp_path / "out", *options)[0] == 0
    path = tmp_path / "out" / "audio" / "r-0.wav"
    assert np.array_equal(samples_of(path), samples if moshi is None else samples[::-1])
    speakers = {word.speaker for word in load_alignments(path.with_suffix(".json"))}
    assert speakers == {"SPEAKER_USER" if moshi else "SPEAKER_MAIN"}


def test_channels_of_two_files_are_put_side_by_side(tmp_path, command):
    fields = cut(tmp_path, channel=[0, 1], kind="MultiCut", start=0, duration=2.0)
    cuts, samples = write_cuts(tmp_path, fields)
    voices = [write_wav(tmp_path / f"{number}.wav", voice)[0] for number, voice in enumerate(samples)]
    sources = [{"type": "file", "channels": [n], "source": f"{n}.wav"} for n in range(2)]
    cuts, _ = write_cuts(tmp_path, fields | {"recording": fields["recording"] | {"sources": sources}})
    out = tmp_path / "out"
    assert command(convert, "lhotse", cuts, "--out", out, "--audio-root", tmp_path)[0] == 0
    assert np.array_equal(samples_of(out / "audio" / "r-0.wav"), voices)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "MixedCut"}, "\"type\": 'MixedCut' is neither a MonoCut nor a MultiCut"),
        ({"channel": [0, 1, 2]}, '"channel" must name one channel or two'),
        ({"channel": 5}, "none of the recording's sources holds channel 5."),
        ({"duration": 9.0}, "the audio ends 7.50 s before the cut does."),
        ({"recording": None}, 'the cut has no "recording"'),
        ({"recording": {"transforms": [{"name": "Speed"}]}}, "the recording has transforms"),
        (
            {"recording": {"sources": [{"type": "url", "channels": [0], "source": "a"}]}},
            "is a 'url', not a file",
        ),
        ({"recording": {"sources": [{"type": "file", "channels": [0], "source": "a"}]}}, "--audio-root says"),
        (
            {"supervisions": [{"id": "s", "text": "one", "start": 0, "duration": 1}]},
            "--times estimate estimates",
        ),
        (
            {"supervisions": [{"id": "s", "alignment": {"word": [["one", 1]]}}]},
            'expected ["word", start, duration]',
        ),
        ({"supervisions": "none"}, '"supervisions" must be a list of objects.'),
        ({"start": "0"}, '"start" must be a number of seconds'),
    ],
)
def test_a_cut_that_cannot_be_converted_is_named_by_its_line(tmp_path, command, changes, reason):
    cuts, _ = write_cuts(tmp_path, cut(tmp_path), cut(tmp_path, id="bad", **changes))
    status, output, _ = command(convert, "lhotse", cuts, "--out", tmp_path / "out")
    assert status == 1
    (line,) = [line for line in output.splitlines() if line.startswith("left out")]
    assert line.startswith(f"left out {cuts} line 2: ") and reason in line


def test_a_damaged_line_is_named_and_a_damaged_archive_ends_it(tmp_path, command):
    cuts, _ = write_cuts(tmp_path, cut(tmp_path))
    cuts.write_text(cuts.read_text() + "\n{\n[]\n" + json.dumps(cut(tmp_path)))
    status, output, _ = command(convert, "lhotse", cuts, "--out", tmp_path / "out")
    assert status == 1 and f"left out {cuts} line 3: is not valid JSON" in output
    assert f"{cuts} line 4: is no JSON object." in output
    assert f"{cuts} line 5: would be called r-0, as the one of {cuts} line 1" in output
    archive, _ = write_cuts(tmp_path, cut(tmp_path), name="cuts.jsonl.gz")
    archive.write_bytes(archive.read_bytes()[:-9])
    status, _, (line,) = command(convert, "lhotse", archive, "--out", tmp_path / "other")
    assert status == 2 and "cuts.jsonl.gz: cannot be read behind line" in line


def test_words_without_times_are_estimated_where_somebody_speaks(tmp_path, command):
    supervision = {"id": "s", "text": "one two", "start": 0.0, "duration": 1.5, "channel": 0}
    cuts, _ = write_cuts(tmp_path, cut(tmp_path, duration=1.5, supervisions=[supervision]))
    status, output, _ = command(convert, "lhotse", cuts, "--out", tmp_path / "out", "--times", "estimate")
    assert status == 0 and "1 recordings have estimated word times" in output
    one, two = load_alignments(tmp_path / "out" / "audio" / "r-0.json")
    assert one.start_sec == pytest.approx(0.1, abs=0.05) and two.end_sec == pytest.approx(1.4, abs=0.05)


def test_an_audio_folder_becomes_mono_recordings_with_estimated_times(tmp_path, command):
    samples = write_wav(tmp_path / "a" / "one.wav", tone(1, 300, (0.1, 0.9)))
    write_folder(tmp_path, [["a/one.wav", "Good, morning", "7"]], ("file_name", "text", "speaker_id"))
    status, output, _ = command(convert, "audiofolder", tmp_path, "--out", tmp_path / "out")
    assert status == 0 and "estimated word times" in output
    (recording,) = load_manifest(tmp_path / "out" / "manifest.jsonl", key="data")
    assert recording.path.name == "a_one.wav" and np.array_equal(samples_of(recording.path), samples)
    good, morning = load_alignments(recording.alignment_path)
    assert (good.text, morning.text) == ("Good,", "morning")
    assert good.start_sec == pytest.approx(0.1, abs=0.05) and good.speaker == "SPEAKER_MAIN"
    assert json.loads((tmp_path / "out" / "manifest.jsonl").read_text())["speaker"] == "7"


def test_times_may_be_left_to_an_aligner(tmp_path, command):
    write_wav(tmp_path / "one.wav", tone(1, 300, (0.3, 0.8)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "one.wav", "sentence": "Hello"}))
    options = ["--text-column", "sentence", "--times", "annotate"]
    status, output, _ = command(convert, "audiofolder", tmp_path, "--out", tmp_path / "out", *options)
    assert status == 0 and "annotate.py" in output
    assert json.loads((tmp_path / "out" / "manifest.jsonl").read_text())["text"] == {"left": "Hello"}
    assert "alignments" not in json.loads((tmp_path / "out" / "audio" / "one.json").read_text())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["../b.wav", "hello"], '"file_name" must lie in the folder of the metadata, not at ../b.wav.'),
        (["b.wav", "hello"], "cannot be read (No such file or directory)."),
        (["one.wav", " "], "\"text\" must be a text that is not empty, not ' '."),
        (["one.wav"], "has another number of columns than the first line."),
        (["stereo.wav", "hello"], "has 2 channels, and nothing says which of them it is; make it mono."),
        (["silent.wav", "hello"], "no times can be estimated: it is silent."),
    ],
)
def test_a_faulty_line_of_metadata_is_named(tmp_path, command, row, reason):
    voice, silence = tone(1, 300, (0.3, 0.8)), tone(1, 300, (0, 0))
    for name, voices in (("one", [voice]), ("stereo", [voice, voice]), ("silent", [silence])):
        write_wav(tmp_path / f"{name}.wav", *voices)
    write_folder(tmp_path, [row, ["one.wav", "hello"]])
    status, output, _ = command(convert, "audiofolder", tmp_path, "--out", tmp_path / "out")
    assert status == 1
    line = output.splitlines()[0]
    assert line.startswith(f"left out {tmp_path / 'metadata.csv'} line 2: ") and line.endswith(reason)


def test_a_missing_column_or_metadata_says_what_there_is(tmp_path, command):
    write_wav(tmp_path / "train" / "one.wav", tone(1, 300, (0.3, 0.8)))
    status, _, (line,) = command(convert, "audiofolder", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "holds no metadata.csv or metadata.jsonl." in line
    write_folder(tmp_path / "train", [["one.wav", "hello"]], ("file_name", "sentence"))
    _, _, (line,) = command(convert, "audiofolder", tmp_path, "--out", tmp_path / "out")
    assert line.endswith(f"; name one of {tmp_path / 'train'}.")
    status, _, (line,) = command(convert, "audiofolder", tmp_path / "train", "--out", tmp_path / "new")
    assert status == 2 and 'there is no column "text" (--text-column), but sentence.' in line
