"""evaluate.py duplex: figures as constructed, answers of a checkpoint, resuming, damage, mistakes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from evaluation_helpers import failure, run_evaluate
from finetune.data.words import Word
from finetune.evaluation.duplex import command as duplex_command
from finetune.evaluation.duplex.layout import find_sets
from finetune.evaluation.duplex.talk import Talker
from finetune.evaluation.word_errors import count_errors, normal_words
from miniatures.duplex import ANSWERS, INTERRUPTS, WAITS, write_bench, write_outputs, write_words

NAMES = list(WAITS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    root = write_bench(tmp_path_factory.mktemp("bench"))
    distributions = {str(number): [1.0] * 61 for number in range(3)}
    (root / "icc_gt_distribution.json").write_text(json.dumps(distributions))
    return root


@pytest.fixture(scope="module")
def short_bench(tmp_path_factory) -> Path:
    return write_bench(tmp_path_factory.mktemp("short"), seconds=0.4, num_samples=2)


@pytest.fixture
def score(capsys, bench, tmp_path):
    """Score outputs that exist; returns status, output and error lines."""

    def run(outputs, *options, data=None, out="out"):
        arguments = ["duplex", "--data", data or bench, "--outputs", outputs, "--out", tmp_path / out]
        return run_evaluate(capsys, *arguments, "--resamples", 50, *options)

    return run


@pytest.fixture
def talk(capsys, short_bench, untrained_run, tmp_path):
    """Let a model answer, and score that."""

    def run(*options, data=None, out="out"):
        arguments = ["duplex", "--data", data or short_bench, "--checkpoint", untrained_run("lora_ttt")]
        return run_evaluate(capsys, *arguments, "--out", tmp_path / out, "--resamples", 20, *options)

    return run


@pytest.fixture
def answered(monkeypatch):
    """How many recordings a model has answered; it may be interrupted at one of them."""
    original = Talker.answer

    def counted(self, user):
        counted.count += 1
        if counted.count == counted.interrupt_at:
            raise KeyboardInterrupt
        return original(self, user)

    counted.count, counted.interrupt_at = 0, None
    monkeypatch.setattr(Talker, "answer", counted)
    return counted


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("source", ["energy", "words"])
def test_models_of_known_behaviour_have_the_figures_that_they_were_made_with(score, tmp_path, source, bench):
    scores = {}
    for name, spoken in (("waits", WAITS), ("interrupts", INTERRUPTS), ("answers", ANSWERS)):
        outputs = write_outputs(tmp_path / name, spoken)
        status, output, errors = score(outputs, "--speech", source, out=f"out-{name}")
        assert (status, errors) == (0, []), output
        found = read(tmp_path / f"out-{name}")
        assert list(found["sets"]) == sorted(NAMES)
        assert all(entry["num_samples"] == 3 for entry in found["sets"].values())
        assert found["failures"] == {} and "waiting in pauses" in output
        scores[name] = found["scores"]
    pause, turn, interruption, listening = NAMES
    takeovers = {name: [found[kind]["takeover"] for kind in NAMES] for name, found in scores.items()}
    assert takeovers == {"waits": [0, 0, 0, 0], "interrupts": [1, 1, 1, 1], "answers": [0, 1, 1, 0]}
    # Sound is looked at in frames of 80 ms.
    near = pytest.approx(0.5, abs=0.081 if source == "energy" else 1e-6)
    assert scores["waits"][turn]["latency_sec"] is None
    assert scores["interrupts"][turn]["latency_sec"] == scores["interrupts"][interruption]["latency_sec"] == 0
    assert scores["interrupts"][turn]["early"] == scores["interrupts"][pause]["speaks_in_pause"] == 1
    assert scores["interrupts"][interruption]["stopped"] == 0
    answers = scores["answers"]
    assert answers[turn] == {"takeover": 1, "latency_sec": near, "early": 0}
    assert answers[interruption]["latency_sec"] == near
    assert answers[interruption]["response_latency_sec"] == near
    assert answers[interruption]["stop_latency_sec"] == near
    assert answers[interruption]["stopped"] == answers[interruption]["speaking_before"] == 1
    assert answers[listening]["backchannels_per_sec"] == pytest.approx(2 / 12)
    assert scores["waits"][listening]["jsd"] == 1 and 0 < answers[listening]["jsd"] < 0.84


def test_intervals_are_over_the_samples_and_definitions_have_units(score, tmp_path):
    outputs = write_outputs(tmp_path / "given", ANSWERS)
    for number in (0, 1):
        shutil.copytree(outputs / NAMES[1] / "2", tmp_path / "kept", dirs_exist_ok=True)
        shutil.rmtree(outputs / NAMES[1] / str(number))
    write_outputs(tmp_path / "silent", WAITS)
    for number in (0, 1):
        shutil.copytree(tmp_path / "silent" / NAMES[1] / str(number), outputs / NAMES[1] / str(number))
    status, output, _ = score(outputs, "--limit", 3)
    found = read(tmp_path / "out")
    takeover = found["sets"][NAMES[1]]["figures"]["takeover"]
    assert status == 0 and takeover["value"] == pytest.approx(1 / 3) and takeover["num_samples"] == 3
    low, high = takeover["interval"]
    assert 0 <= low < takeover["value"] < high <= 1 and f"[{low:.3f}, {high:.3f}]" in output
    assert found["sets"][NAMES[1]]["figures"]["latency_sec"]["num_samples"] == 1
    assert takeover["unit"] == found["definitions"]["takeover"]["unit"] == "share of samples"
    assert found["samples"][f"{NAMES[1]}/2"]["speech"] == [[6.48, 10.0]]


def test_a_damaged_sample_is_an_error_by_name_and_in_no_figure(score, tmp_path, bench):
    data = shutil.copytree(bench, tmp_path / "data")
    outputs = write_outputs(tmp_path / "given", INTERRUPTS)
    pause, turn, interruption, listening = NAMES
    (outputs / pause / "0" / "output.wav").write_bytes(b"RIFF nothing")
    (outputs / pause / "1" / "output.wav").unlink()
    (data / turn / "0" / "turn_taking.json").write_text('[{"timestamp": [3, NaN]}]')
    (data / turn / "1" / "turn_taking.json").unlink()
    (data / interruption / "0" / "interrupt.json").write_text('[{"timestamp": [30.0, 40.0]}]')
    (data / interruption / "1" / "interrupt.json").write_text("[]")
    (data / "icc_gt_distribution.json").write_text('{"0": [1, 2], "1": [1, 2]}')
    status, output, errors = score(outputs, data=data)
    found = read(tmp_path / "out")
    broken = {f"{name}/{number}" for name in (pause, turn, interruption) for number in (0, 1)}
    assert set(found["failures"]) == broken | {f"{listening}/2"}
    assert status == 2 and "7 samples failed, 0 may" in errors[0]
    for name, said in {
        f"{pause}/1": "does not exist",
        f"{turn}/0": "not a timestamp",
        f"{turn}/1": "has no turn_taking.json",
        f"{interruption}/0": "output.wav ends at 12.00 s, before what it is judged by at 40.00 s",
        f"{interruption}/1": "at least one",
        f"{listening}/2": "no entry '2'",
    }.items():
        assert said in found["failures"][name] and "\n" not in found["failures"][name]
    assert all(name in output for name in broken)
    for name in (pause, turn, interruption):
        assert found["sets"][name]["num_samples"] == 1 and found["scores"][name]["takeover"] == 1
    assert score(outputs, "--max-failures", 7, data=data)[0] == 0
    (outputs / pause / "2" / "output.wav").unlink()
    status, _, errors = score(outputs, "--max-failures", 9, data=data)
    assert status == 2 and f"{pause}: no sample is left" in errors[0]


def test_a_checkpoint_answers_in_time_with_its_recordings_and_goes_on_after_an_interruption(
    talk, answered, tmp_path, short_bench, monkeypatch
):
    answered.interrupt_at = 4
    assert talk()[0] == 130 and not (tmp_path / "out" / "results.json").exists()
    answered.interrupt_at = None
    monkeypatch.chdir(short_bench)
    status, output, errors = talk(data=".")
    assert (status, errors) == (0, []), output
    assert "3 answers were there already" in output and answered.count == 4 + 5
    whole = read(tmp_path / "out")
    assert whole["model"]["step"] == 7 and whole["settings"]["talk"]["seed"] == 0
    assert len(whole["samples"]) == 8
    assert {round(sample["duration_sec"], 2) for sample in whole["samples"].values()} == {0.4}
    folder = tmp_path / "out" / "outputs" / NAMES[1] / "1"
    written = (folder / "output.wav").read_bytes()
    words = json.loads((folder / "output.json").read_text())
    assert words["moshi_ttt"]["source"] == "text stream"
    (folder / "output.wav").write_bytes(written[:-2])  # damaged answers are made again, the same ones
    assert talk("--speech", "words")[0] == 0 and answered.count == 10
    assert (folder / "output.wav").read_bytes() == written
    status, _, errors = talk("--greedy")
    assert status == 2 and "holds a measurement with greedy false instead of true" in errors[0]


def test_what_a_user_gets_wrong_is_said_in_a_line(score, talk, capsys, bench, tmp_path):
    def refused(*arguments):
        return failure(lambda *options: run_evaluate(capsys, "duplex", *options), tmp_path, *arguments)

    assert "--checkpoint: give a trained model" in refused("--data", bench)
    assert "leave out --checkpoint" in refused("--data", bench, "--outputs", bench, "--checkpoint", "run")
    assert "is not a folder" in refused("--data", bench, "--outputs", bench / "none")
    assert "--data: is empty" in refused("--data", "", "--outputs", bench)
    assert "is not a folder" in refused("--data", bench / "none", "--outputs", bench)
    assert "holds no samples" in refused("--data", bench / NAMES[0] / "0", "--outputs", bench)
    assert "from -120 to below 0" in refused("--data", bench, "--outputs", bench, "--threshold-db", "3")
    other = shutil.copytree(bench / NAMES[0], tmp_path / "mine")
    assert "say no task" in refused("--data", other, "--outputs", other)
    given = tmp_path / "odd.json"
    given.write_text('{"0": "no"}')
    assert "list of shares" in refused("--data", bench, "--outputs", bench, "--distribution", given)


def test_sets_are_known_by_their_names_or_as_told(bench, tmp_path):
    for name in ("user_interruption", "user_backchannel", "talking_to_other", "background_speech", "other"):
        folder = tmp_path / name / "7"
        folder.mkdir(parents=True)
        (folder / "input.wav").touch()
    sets, left_out = find_sets(tmp_path)
    assert {each.name: each.task for each in sets} == {
        name: name
        for name in ("user_interruption", "user_backchannel", "talking_to_other", "background_speech")
    }
    assert left_out == ["other"]
    assert find_sets(tmp_path / "other", task="pause_handling")[0][0].task == "pause_handling"
    tasks = ("pause_handling", "smooth_turn_taking", "user_interruption", "backchannel")
    assert {each.name: each.task for each in find_sets(bench)[0]} == dict(zip(NAMES, tasks, strict=True))


def test_overlaps_of_version_1_5_are_read_from_their_metadata(score, tmp_path):
    data = write_bench(tmp_path / "data", num_samples=1)
    shutil.move(data / NAMES[2], data / "user_backchannel")
    folder = data / "user_backchannel" / "0"
    (folder / "interrupt.json").unlink()
    (folder / "metadata.json").write_text('{"context_text": "a", "timestamps": [4.0, 6.0]}')
    write_outputs(tmp_path / "given", {"user_backchannel": ANSWERS[NAMES[2]]}, num_samples=1)
    status, _, errors = score(tmp_path / "given", data=data / "user_backchannel")
    assert (status, errors) == (0, [])
    # By id alone, which of several sets would be anybody's.
    by_id = tmp_path / "given" / "user_backchannel"
    assert score(by_id, data=data / "user_backchannel", out="by-id")[0] == 0
    assert read(tmp_path / "by-id")["scores"] == read(tmp_path / "out")["scores"]
    status, _, errors = score(by_id, data=data, out="mixed")
    assert status == 2 and "4 samples failed" in errors[0] and "does not exist" in errors[0]
    figures = read(tmp_path / "out")["sets"]["user_backchannel"]["figures"]
    assert figures["stopped"]["value"] == 1 and figures["stopped"]["better"] == "lower"


class Hears:
    """Stands in the place of a recogniser."""

    def __init__(self, text):
        self.text = text
        self.count = 0

    def transcribe(self, samples):
        self.count += 1
        return [Word(word, 0.0, 0.1) for word in self.text.split()]


def test_word_errors_are_those_of_a_recogniser_against_the_text_stream(score, tmp_path, bench, monkeypatch):
    pytest.importorskip("jiwer")
    outputs = write_outputs(tmp_path / "given", ANSWERS)
    for path in outputs.rglob("output.json"):
        content = json.loads(path.read_text()) | {"moshi_ttt": {"source": "text stream"}}
        path.write_text(json.dumps(content))
    said = tmp_path / "given" / NAMES[3] / "0" / "output.json"
    assert len(json.loads(said.read_text())["chunks"]) == 2
    hears = Hears("word wort")
    monkeypatch.setattr(duplex_command, "make_recogniser", lambda *_, **__: hears)
    status, output, errors = score(outputs, "--wer", "pocketsphinx")
    assert (status, errors) == (0, []), output
    found = read(tmp_path / "out")
    backchannels = found["sets"][NAMES[3]]["figures"]["wer"]
    assert backchannels["value"] == 0.5 and backchannels["num_samples"] == 3  # one of two words
    # 7 words were written, one heard right, one wrong, five not at all.
    assert found["sets"][NAMES[1]]["figures"]["wer"]["value"] == pytest.approx(6 / 7)
    silent = found["samples"][f"{NAMES[0]}/0"]["wer"]
    assert (silent["num_words"], silent["insertions"]) == (0, 2)
    assert found["sets"][NAMES[0]]["figures"]["wer"]["value"] is None
    assert hears.count == 12 and score(outputs, "--wer", "pocketsphinx")[0] == 0 and hears.count == 12


def test_a_missing_package_is_named_before_a_model_speaks(talk, answered, monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    status, _, errors = talk("--wer", "pocketsphinx")
    assert (status, answered.count) == (2, 0) and "pip install 'moshi-ttt[wer]'" in errors[0]


def test_only_the_text_stream_is_a_reference_for_word_errors(score, tmp_path, monkeypatch):
    pytest.importorskip("jiwer")
    monkeypatch.setattr(duplex_command, "make_recogniser", lambda *_, **__: Hears("word"))
    outputs = write_outputs(tmp_path / "given", ANSWERS)
    status, _, errors = score(outputs, "--wer", "pocketsphinx")
    assert status == 2 and "not those of the model's text stream" in errors[0]


def test_texts_are_compared_as_they_are_said():
    assert normal_words("Well, it's 7:30 — I’m READY!") == ["well", "it's", "seven", "thirty", "i'm", "ready"]
    assert normal_words("Привет, мир") == ["привет", "мир"]
    pytest.importorskip("jiwer")
    found = count_errors("a b c d", "a x d e e")
    assert (found.num_words, found.substitutions + found.deletions + found.insertions) == (4, 4)
    assert count_errors("It's 5.", "it's five").num_errors == 0


def test_words_without_a_time_of_their_end_are_read(tmp_path, bench, score):
    outputs = write_outputs(tmp_path / "given", WAITS)
    path = outputs / NAMES[1] / "0" / "output.json"
    words = [{"text": " word", "timestamp": [7.0 + k / 10, None]} for k in range(4)]
    path.write_text(json.dumps({"text": "", "chunks": words}))
    write_words(outputs / NAMES[1] / "1" / "output.json", [(7.0, 9.0)])
    (outputs / NAMES[1] / "2" / "output.json").write_text('{"chunks": [{"text": 3}]}')
    status, _, errors = score(outputs, "--speech", "words")
    assert status == 2 and "expected" in errors[0]
    found = read(tmp_path / "out")["sets"][NAMES[1]]["figures"]["takeover"]
    assert (found["value"], found["num_samples"]) == (1, 2)
