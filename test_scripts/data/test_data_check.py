"""`python -m finetune.data.check`: what it prints, writes, mends and returns."""

import io
import json
import sys

import numpy as np
import pytest
import sentencepiece

from faulty_data import NUM_SAMPLES, RATE, line_of, voices, wav, write_good
from finetune.commands import run_command
from finetune.data.check.command import check
from finetune.data.check.sound_levels import LevelMeter


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Check a manifest of these lines; returns the exit status and what was printed."""

    def checked(*arguments, lines=None):
        manifest = tmp_path / "m.jsonl"
        if lines is not None:
            manifest.write_bytes(b"".join(line + b"\n" for line in lines))
        monkeypatch.setattr(sys, "argv", ["check", str(manifest), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command(check)
        output = capsys.readouterr()
        return caught.value.code, output.out + output.err

    return checked


def swapped(folder, name, *, num_words, share):
    """A recording with a silent left channel for a share of it, and a silent right one for the rest."""
    samples = voices(name, 10 * RATE)
    samples[0] = 0
    samples[1, int(share * 10 * RATE) :] = 0
    samples[0, int(share * 10 * RATE) :] = 0.1
    path = write_good(folder, name)
    path.write_bytes(wav(samples))
    times = np.arange(num_words) * 10 / num_words
    words = [["a", [time, time + 0.2], "SPEAKER_MAIN"] for time in times]
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return line_of(name, duration_sec=10)


def test_a_good_data_set_has_status_0(tmp_path, run):
    write_good(tmp_path, "a")
    status, output = run(lines=[line_of("a")])
    assert status == 0
    assert output.splitlines()[-1] == "1 line, 0.00 h of audio: 0 errors, 0 warnings, 0 notes"
    assert "left out: whether the tokenizer can spell the words" in output


def test_errors_have_status_1_and_warnings_0(tmp_path, run):
    for name in "ab":
        write_good(tmp_path, name)
    (tmp_path / "b.json").write_text('{"alignments": [["", [0.1, 0.2], "SPEAKER_MAIN"]]}')
    status, output = run(lines=[line_of("a"), line_of("b")])
    assert status == 0
    assert "1 warning:\n  empty-word" in output
    status, output = run(lines=[line_of("a"), line_of("b"), line_of("c")])
    assert status == 1
    assert "1 error:\n  missing" in output
    assert "m.jsonl line 3): cannot be found" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs: 0 is less than 1"),
        (["--overview", "a.pdf"], "must end in .html or .png"),
        (["--json", "/nowhere/a.json"], "cannot be written"),
        (["--tokenizer", "/nowhere/t.model"], "not a sentencepiece model"),
        (["--mono", "left"], "invalid choice"),
    ],
)
def test_what_cannot_be_done_has_status_2_and_one_line(tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_good(tmp_path, "a")
    status, output = run(*arguments, lines=[line_of("a")])
    assert status == 2
    assert message in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("content", [None, [], [b"", b" "]])
def test_without_a_manifest_the_status_is_2(run, content):
    assert run(lines=content)[0] == 2


def test_a_mono_file_is_an_error_unless_training_takes_it(tmp_path, run):
    write_good(tmp_path, "a").write_bytes(wav(voices("a")[:1]))
    assert run(lines=[line_of("a")])[0] == 1
    for mono in ("duplicate", "user_silent"):
        status, output = run("--mono", mono)
        assert status == 0, output


def test_channels_that_are_swapped_are_an_error(tmp_path, run):
    many = swapped(tmp_path, "many", num_words=10, share=0.75)
    few = swapped(tmp_path, "few", num_words=4, share=0.75)
    fewer = swapped(tmp_path, "less-than-half", num_words=20, share=0.4)
    status, output = run(lines=[many, few, fewer])
    assert status == 1
    found = [line for line in output.splitlines() if "swapped-channels" in line]
    assert len(found) == 1
    assert "many.wav" in found[0]
    assert "8 of 10 words of SPEAKER_MAIN are heard on the right channel only" in found[0]


def test_words_that_the_tokenizer_cannot_spell_are_found(tmp_path, run):
    write_good(tmp_path, "a")
    write_good(tmp_path, "b").with_suffix(".json").write_text(
        json.dumps({"alignments": [["語", [0.1, 0.2], "SPEAKER_MAIN"], ["語", [0.1, 0.2], "SPEAKER_USER"]]})
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Hello hi"] * 20),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    _, output = run("--tokenizer", tmp_path / "t.model", lines=[line_of("a"), line_of("b")])
    assert "left out" not in output
    found = [line for line in output.splitlines() if "unknown-text" in line]
    assert len(found) == 1
    assert "b.json" in found[0]
    assert "1 of 1 words" in found[0]


def test_the_tokenizer_of_a_model_is_found(tmp_path, run, demo):
    write_good(tmp_path, "a")
    status, output = run("--base", demo.model_dir, lines=[line_of("a")])
    assert status == 0
    assert "left out" not in output


def test_fix_writes_durations_and_nothing_else(tmp_path, run):
    for name in "abcd":
        write_good(tmp_path, name)
    (tmp_path / "d.wav").write_bytes(b"damaged")
    lines = [
        b'\xef\xbb\xbf{"path": "a.wav",  "duration": 9, "text": {"left": "\xc3\xbc"}, "n": [1, null]}\r',
        b'{ "path":"b.wav","duration":0.50 }',
        b"",
        b'{"path": "c.wav", "id": 7}',
        b'{"path": "d.wav", "duration": 3}',
        b"nonsense",
    ]
    status, output = run("--fix", lines=lines)
    assert status == 1  # of d.wav and nonsense
    assert "fixed 2 durations" in output
    assert "duration " not in output.replace("durations", "")
    new = (tmp_path / "m.jsonl").read_bytes().split(b"\n")[:-1]
    lines[0] = (
        b'\xef\xbb\xbf{"path": "a.wav", "duration": 0.5, "text": {"left": "\xc3\xbc"}, "n": [1, null]}\r'
    )
    lines[3] = b'{"path": "c.wav", "id": 7, "duration": 0.5}'
    assert new == lines
    backup = (tmp_path / "m.jsonl.bak").read_bytes()
    assert b'"duration": 9' in backup
    (tmp_path / "m.jsonl").write_bytes(backup)
    run("--fix")
    assert (tmp_path / "m.jsonl.bak").read_bytes() == backup
    assert (tmp_path / "m.jsonl.bak-2").read_bytes() == backup


def test_without_a_wrong_duration_fix_leaves_the_file_alone(tmp_path, run):
    write_good(tmp_path, "a")
    run("--fix", lines=[b'{"path":"a.wav","duration":0.51}'])
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"path":"a.wav","duration":0.51}\n'
    assert not (tmp_path / "m.jsonl.bak").exists()


def test_the_output_does_not_depend_on_the_number_of_processes(tmp_path, run):
    lines = []
    for number in range(12):
        path = write_good(tmp_path, str(number))
        if number % 3 == 0:
            path.write_bytes(wav(voices(str(number), NUM_SAMPLES * (14 - number))))
        lines.append(line_of(str(number)))
    first, second = run(lines=lines), run("--jobs", "3")
    assert first == second
    assert first[1].count("  duration") == 4


def test_the_json_holds_findings_and_recordings(tmp_path, run):
    write_good(tmp_path, "a")
    run("--json", tmp_path / "r.json", lines=[line_of("a"), line_of("\udcff")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["summary"] == {"lines": 2, "error": 1, "warning": 0, "note": 0}
    (finding,) = report["findings"]
    assert (finding["severity"], finding["code"]) == ("error", "missing")
    assert finding["line"].endswith("m.jsonl line 2")
    assert report["recordings"][0]["duration_sec"] == 0.5
    assert report["recordings"][0]["words_per_minute"] == [120, 120]


def test_the_overview_is_one_page_without_foreign_markup(tmp_path, run):
    name = '<script src="x">&'
    write_good(tmp_path, "a")
    for path in ("o.html", "o.png"):
        run(
            "--overview",
            tmp_path / path,
            lines=[line_of("a"), json.dumps({"path": name, "duration": 1}).encode()],
        )
    page = (tmp_path / "o.html").read_text()
    assert "<script" not in page
    assert "&lt;script" in page
    assert 'src="data:image/png;base64,' in page
    assert page.count("src=") == 2  # the picture's, and the name's, which is text
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sizes", [[4410], [1, 440, 3969], [441] * 10, [1000, 3410]])
def test_levels_do_not_depend_on_how_a_recording_is_cut(sizes):
    samples = voices("levels", 4410)
    samples[1] = 0
    meter = LevelMeter(2, 22050)
    for piece in np.split(samples, np.cumsum(sizes)[:-1], axis=1):
        meter.add(piece)
    levels = meter.finish()
    assert levels.num_samples == 4410
    expected = 10 * np.log10(np.mean(samples[0].astype(np.float64).reshape(10, 441) ** 2, axis=1))
    np.testing.assert_allclose(levels.dbfs[0], expected)
    assert levels.silent_share(1) == 1
    assert levels.silent_share(0) == 0
