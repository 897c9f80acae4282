"""What scores say: right answers, chance, margins, swapped labels, intervals and pairs."""

import pytest
import torch

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.recall.accuracy import Measured, correct, margins, paired, summarise
from finetune.evaluation.recall.engine import AnswerScores
from finetune.evaluation.recall.items import Group
from finetune.evaluation.recall.score_file import ScoreFile


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def item(name, rows):
    scores = AnswerScores(*[matrix(rows)] * 3)
    return Measured(Group(name, "name", "user", (), None, (), ()), {10: scores})


KNOWS = [[-1.0, -5.0], [-9.0, -2.0]]
DOES_NOT = [[-1.0, -5.0], [-1.0, -5.0]]


def test_a_model_that_cannot_tell_conversations_apart_is_right_in_one_of_them():
    for seed in range(20):
        row = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert correct(row.expand(5, 5)) == 1
    assert correct(matrix([[-3.0] * 4] * 4)) == 1  # all equal: a quarter of four each


def test_right_answers_and_margins_are_those_of_a_hand_computation():
    assert correct(matrix(KNOWS)) == 2
    assert correct(matrix([[-1.0, -1.0], [-9.0, -2.0]])) == 1.5
    assert margins(matrix(KNOWS)) == (5 - 1) + (9 - 2)
    assert margins(matrix([[-1.0, -3.0, -5.0]] * 3)) == 0.0
    assert margins(matrix([[-1.0, -3.0, -5.0], [-2.0, -1.0, -6.0], [-1.0, -1.0, -1.0]])) == 3 + 3 + 0


def test_swapped_labels_give_the_complement():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        assert correct(scores) + correct(scores.flip(1)) == 2
        assert margins(scores) == pytest.approx(-margins(scores.flip(1)))


def test_summaries_count_conversations_and_draw_items():
    items = [item("a", KNOWS), item("b", DOES_NOT), item("c", KNOWS)]
    found = summarise(items, 10, "text", RatioBootstrap(200, seed=0))
    assert found["accuracy"] == pytest.approx(5 / 6) and found["chance"] == 0.5
    assert (found["num_items"], found["num_conversations"]) == (3, 6)
    low, high = found["interval"]
    assert 0.5 <= low < 5 / 6 < high <= 1
    assert summarise(items[:1], 10, "text", RatioBootstrap(200))["interval"] is None


def test_an_answer_that_is_likelier_everywhere_hides_what_is_known_but_not_from_telling_apart():
    found = summarise([item("a", [[-9.0, -2.0], [-11.0, -1.0]])], 10, "text", RatioBootstrap(10))
    assert (found["accuracy"], found["told_apart"]) == (0.5, 1.0)
    found = summarise([item("b", DOES_NOT)], 10, "text", RatioBootstrap(10))
    assert (found["accuracy"], found["told_apart"]) == (0.5, 0.5)


def test_pairs_compare_the_same_items():
    first, second = [item("a", KNOWS), item("b", KNOWS)], [item("a", DOES_NOT), item("b", DOES_NOT)]
    found = paired(first, second, 10, "audio", RatioBootstrap(200))
    assert found["accuracy"] == 0.5 and found["interval"] == (0.5, 0.5)
    with pytest.raises(ValueError, match="not the same items"):
        paired(first, second[:1], 10, "audio", RatioBootstrap(200))


def test_scores_come_back_from_their_file_and_half_a_line_loses_that_item_only(tmp_path):
    path = tmp_path / "scores.jsonl"
    for name in "ab":
        ScoreFile(path).add("on", f"digest {name}", name, item(name, KNOWS).scores)
        assert path.read_text().count(f"digest {name}") == 1
    assert torch.equal(ScoreFile(path).find("on", "digest b", [10])[10].text, matrix(KNOWS))
    assert ScoreFile(path).find("off", "digest b", [10]) is None
    assert ScoreFile(path).find("on", "digest b", [10, 20]) is None
    path.write_text(path.read_text()[:-9])
    file = ScoreFile(path)
    assert file.find("on", "digest b", [10]) is None and file.find("on", "digest a", [10]) is not None
    file.add("on", "digest b", "b", item("b", DOES_NOT).scores)
    assert torch.equal(ScoreFile(path).find("on", "digest b", [10])[10].audio, matrix(DOES_NOT))
