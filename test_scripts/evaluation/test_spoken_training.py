"""`eval.spoken`: accuracies during training, which leave the training as it is."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from finetune.errors import DataError
from finetune.evaluation.command import evaluate
from finetune.files import read_json_object
from finetune.training import spoken_scores as training
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from run_helpers import command_line, read_metrics, run_args, run_values, write_yaml
from spoken_helpers import write_sblimp, write_stories, write_swuggy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Miniature sWUGGY, sBLIMP and tStoryCloze; stories are longer than the chunks of the training."""
    root = tmp_path_factory.mktemp("spoken")
    write_swuggy(root, num_ids=6)
    write_sblimp(root, num_ids=4)
    write_stories(root / "tstory", num_ids=2)
    return root


SETTINGS = {"max_steps": 4, "duration_sec": 2.56, "do_ckpt": False}


def spoken(data, **values):
    return {"eval": {"spoken": {"data": str(data), **values}}}


def test_accuracies_are_logged_and_the_training_is_bitwise_the_same(
    demo, data, tmp_path, monkeypatch, capsys
):
    memories = {}
    original = Trainer._evaluate

    def watched(self, *, last):
        before = {name: tensor.clone() for name, tensor in self.state.memory.tensors().items()}
        random_state = torch.get_rng_state()
        original(self, last=last)
        after = self.state.memory.tensors()
        assert before and before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(random_state, torch.get_rng_state())
        assert self.model.training and all(module.training for module in self.model.modules())
        memories.setdefault(self.run_dir.name, []).append(before)

    monkeypatch.setattr(Trainer, "_evaluate", watched)
    run_training(run_args(demo, tmp_path / "without", **SETTINGS))
    run_training(run_args(demo, tmp_path / "with", **SETTINGS, **spoken(data, freq=2, limit=3)))
    plain, measured = (read_metrics(tmp_path / name, "train") for name in ("without", "with"))
    assert len(plain) == 4
    for ours, theirs in zip(measured, plain, strict=True):
        for name in ("loss", "text_loss", "audio_loss", "grad_norm", "memory_carried", "ttt_alpha"):
            assert ours[name] == theirs[name]
    for ours, theirs in zip(memories["with"], memories["without"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_metrics(tmp_path / "without", "eval") == []
    records = read_metrics(tmp_path / "with", "eval")
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert record.keys() - {"split", "step"} == {
            f"{name}{kind}" for name in ("swuggy", "sblimp", "tstory") for kind in ("", "_semantic")
        }
        assert record["swuggy"] * 6 == pytest.approx(round(record["swuggy"] * 6))  # three ids of two voices
    assert "sstory is left out" in capsys.readouterr().out


def test_it_comes_with_the_losses_as_one_record_and_at_the_end_without_a_frequency(demo, data, tmp_path):
    settings = SETTINGS | {"do_eval": True, "eval_freq": 2}
    run_training(run_args(demo, tmp_path / "run", **settings, **spoken(data, tasks=["tstory"])))
    first, last = read_metrics(tmp_path / "run", "eval")
    assert "tstory" not in first and "audio_loss" in first
    assert "tstory" in last and "audio_loss" in last and last["step"] == 4 and "swuggy" not in last


def test_it_is_the_score_of_the_checkpoint(demo, data, tmp_path):
    settings = SETTINGS | {"max_steps": 2, "do_ckpt": True, "first_codebook_weight_multiplier": 3.0}
    run_training(run_args(demo, tmp_path / "run", **settings, **spoken(data)))
    evaluate(
        ["all", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--out", str(tmp_path / "out")]
    )
    found = read_json_object(tmp_path / "out" / "results.json")
    (record,) = read_metrics(tmp_path / "run", "eval")
    assert found["model"]["semantic_weight"] == 3
    for name, value in found["scores"].items():
        assert record[name] == pytest.approx(value)
        semantic = found["tasks"][name]["accuracy"]["semantic"]["value"]
        assert record[f"{name}_semantic"] == pytest.approx(semantic)


def test_what_is_wrong_with_the_data_is_one_line_before_the_first_step(
    demo, data, tmp_path, monkeypatch, capsys
):
    def fails(folder, **values):
        path = tmp_path / "config.yaml"
        run_dir = tmp_path / "run"
        write_yaml(path, run_values(demo, run_dir, **SETTINGS, **spoken(folder, **values)))
        capsys.readouterr()
        assert command_line(monkeypatch, path) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert not run_dir.exists()
        return line

    assert "eval.spoken.data: " in (line := fails(tmp_path / "nowhere")) and "does not exist" in line
    assert "eval.spoken.data: " in (line := fails(tmp_path)) and "has no folder lexical/" in line
    line = fails(data, tasks=["swuggy", "sstory"])
    assert line.startswith("error: eval.spoken.data: ") and "has no folder sstory/" in line
    assert "eval.spoken.tasks: 'blimp' is not allowed, expected list of (swuggy" in fails(
        data, tasks=["blimp"]
    )
    assert "eval.spoken.limit: 0 is not allowed" in fails(data, limit=0)
    broken = tmp_path / "broken"
    shutil.copytree(data / "tstory", broken / "tstory")
    for path in (broken / "tstory").glob("*.wav"):
        path.write_bytes(b"noise")
    line = fails(broken)
    assert "no pair of tstory can be used; " in line and "broken" in line


def prefer_short(monkeypatch, *, infinite: int | None = None):
    """A model that finds short items likelier, which here are the correct ones; one of a pass is infinite."""
    score_items = training.score_items

    def scored(lm, codes, **settings):
        scores = []
        for score in score_items(lm, codes, **settings):
            per_code = torch.full_like(score.log_likelihood, -score.num_frames)
            scores.append(replace(score, log_likelihood=per_code * score.num_tokens))
        if infinite is not None:
            scores[infinite].log_likelihood[1] = math.inf
        return scores

    monkeypatch.setattr(training, "score_items", scored)


def test_a_pair_that_cannot_be_read_is_left_out_and_named(demo, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data / "tstory", folder / "tstory")
    (folder / "tstory" / "1_0_incorrect.wav").write_bytes(b"noise")
    prefer_short(monkeypatch)
    settings = SETTINGS | {"max_steps": 1}
    run_training(run_args(demo, tmp_path / "run", **settings, **spoken(folder)))
    (record,) = read_metrics(tmp_path / "run", "eval")
    assert record["tstory"] == record["tstory_semantic"] == 1  # of the other pair; half of both
    assert "left out 1_0_incorrect" in capsys.readouterr().err


def test_what_the_model_makes_infinite_is_left_out_and_named(demo, data, tmp_path, monkeypatch, capsys):
    prefer_short(monkeypatch, infinite=0)
    # Two items a pass, the longest first: the first of both passes belong to the first pair.
    settings = SETTINGS | {"max_steps": 1, "batch_size": 1}
    run_training(run_args(demo, tmp_path / "run", **settings, **spoken(data, tasks=["tstory"])))
    assert (
        "eval.spoken: tstory: 2 items are left out, their log-likelihood is not finite: "
        "0_0_correct, 1_0_incorrect" in capsys.readouterr().err
    )
    (record,) = read_metrics(tmp_path / "run", "eval")
    assert record["tstory"] == record["tstory_semantic"] == 1  # of the second pair


def test_a_cache_that_cannot_be_written_names_the_key_of_the_configuration(demo, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data / "tstory", folder / "tstory", ignore=shutil.ignore_patterns(".*"))
    (folder / "tstory" / ".moshi_ttt_codes").touch()
    with pytest.raises(DataError, match=r"^data\.cache_dir: cannot write .* set data\.cache_dir to a folder"):
        run_training(run_args(demo, tmp_path / "run", **SETTINGS, **spoken(folder)))


def test_processes_share_the_items_and_agree(demo, data, tmp_path, monkeypatch):
    """Each rank scores its part of every batch, in as many passes as the others, and gets all scores."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for path in (folder / "tstory").glob("*_correct.wav"):  # the same recording twice
        number, story, _ = path.name.split("_")
        shutil.copy(path, path.with_name(f"{int(number) + 1}_{story}_incorrect.wav"))
    args = run_args(demo, tmp_path / "run", "ttt", **SETTINGS, **spoken(folder))
    made = []
    original = training.SpokenEvaluator.build.__func__

    def kept(cls, *arguments):
        made.append((original(cls, *arguments), arguments[3]))
        return

    monkeypatch.setattr(training.SpokenEvaluator, "build", classmethod(kept))
    run_training(args)
    ((evaluator, model),) = made
    alone = evaluator.measure(model)
    assert alone["tstory"] == alone["tstory_semantic"] == 0.5
    passes, parts = [], []
    score_items = training.score_items

    def counted(lm, codes, **settings):
        passes[-1] += 1
        return score_items(lm, codes, **settings)

    monkeypatch.setattr(training, "score_items", counted)
    monkeypatch.setattr(training, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(training, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(training, "gather_objects", lambda mine: parts.append(mine) or [mine])
        passes.append(0)
        model.eval()
        for encoded in evaluator._encoded:
            evaluator._score(model, encoded.distinct())
    assert len(set(passes)) == 1
    num_tasks = len(evaluator._encoded)
    everything = [[parts[rank * num_tasks + task] for rank in range(3)] for task in range(num_tasks)]
    for encoded, shares in zip(evaluator._encoded, everything, strict=True):
        assert set().union(*shares) == encoded.distinct().keys()
        assert (len(encoded.codes) > len(encoded.distinct())) == (encoded.name == "tstory")
    shares = iter(everything)
    monkeypatch.setattr(training, "gather_objects", lambda mine: next(shares))
    assert evaluator.measure(model) == pytest.approx(alone)
