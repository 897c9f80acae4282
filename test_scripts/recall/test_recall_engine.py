"""Likelihoods of answers: equal to whole passes, however they are computed; chance without a memory."""

from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.streaming import State

from conftest import make_codes, make_tiny_lm
from evaluation_helpers import open_ttt
from finetune.evaluation.recall import engine
from finetune.evaluation.recall.accuracy import correct
from finetune.evaluation.recall.conversations import CodedGroup, Filler
from finetune.evaluation.recall.engine import score_groups
from finetune.evaluation.recall.items import Group
from moshi_ttt.hybrid_model import set_ttt_mode
from moshi_ttt.session import copy_stream

WINDOW, CUE = 10, 5
LAGS = (5, 17, 40)
PIECES = {Path("a"): 13, Path("b"): 8}


def coded_group(lm, name="one", *, num=3, plant_frames=9, seed=0) -> CodedGroup:
    """An item of random tokens."""
    codes = make_codes(lm, 20, 30, seed=seed)
    codes[:, 0] %= lm.text_card - 8
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 5, (num,), generator=generator).tolist()
    pieces = {path: codes[10 + index][:, :size] for index, (path, size) in enumerate(PIECES.items())}
    group = Group(name, "name", "user", (), Path(), (), tuple(pieces))
    filler = Filler(list(pieces), pieces.__getitem__, seed=name)
    cue = codes[19, :, : 3 + seed % 3]
    answers = [codes[5 + index][:, :size] for index, size in enumerate(lengths)]
    return CodedGroup(group, list(codes[:num, :, :plant_frames]), filler, cue, answers, name)


def ttt_lm(**overrides):
    return open_ttt(make_tiny_lm(context=WINDOW, **overrides), non_ttt_layer_context=7)


def whole_pass(lm, group, lag):
    """Of every answer in every conversation, `[K, K]` each, by Moshi's own forward."""
    num = len(group.plants)
    scores = torch.zeros(3, num, num, dtype=torch.float64)
    for plant in range(num):
        for answer in range(num):
            stream = group.conversation(plant, lag=lag, answer=answer)
            # Without frames after it Moshi's forward does not come to the delayed codes of the last one.
            end = torch.full((lm.num_codebooks, max(lm.delays)), lm.zero_token_id)
            codes = torch.cat([stream.frames(0, stream.num_frames), end], 1)[None]
            with torch.no_grad():
                out = lm(codes)
            there = slice(stream.answer_start, stream.num_frames)
            parts = []
            for logits, targets in (
                (out.text_logits, codes[:, :1]),
                (out.logits, codes[:, 1 : 1 + lm.dep_q]),
            ):
                values = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[0, ..., 0]
                parts.append(values[:, there].sum(1))
            scores[:, plant, answer] = torch.stack([parts[0][0], parts[1][0], parts[1].sum()])
    return scores


def score(lm, groups, lags=LAGS, **settings):
    return score_groups(lm, groups, lags=lags, **({"cue_frames": CUE, "chunk_frames": 7} | settings))


@pytest.mark.parametrize("chunk_frames", [1, 7, 1000])
def test_scores_equal_those_of_whole_passes_with_moshis_delays(chunk_frames):
    lm, groups = ttt_lm(), []
    assert max(lm.delays) > 0
    groups = [coded_group(lm, "one"), coded_group(lm, "two", seed=1)]
    for group, found in zip(groups, score(lm, groups, chunk_frames=chunk_frames), strict=True):
        assert list(found) == list(LAGS)
        for lag, scores in found.items():
            assert (torch.stack(scores) - whole_pass(lm, group, lag)).abs().max() < 1e-6


def test_scores_do_not_depend_on_batch_order_and_other_lags():
    lm = ttt_lm()
    groups = [coded_group(lm, "one"), coded_group(lm, "two", seed=1, num=2)]
    together, backwards = score(lm, groups), score(lm, groups[::-1])[::-1]
    alone = [score(lm, [group], lags=[17])[0] for group in groups]
    for one, two, three in zip(together, backwards, alone, strict=True):
        assert torch.allclose(torch.stack(one[17]), torch.stack(two[17]), atol=1e-9)
        assert torch.allclose(torch.stack(one[17]), torch.stack(three[17]), atol=1e-9)


def test_without_access_to_the_plant_exactly_one_conversation_of_an_item_is_right():
    lm = ttt_lm()
    for mode in ("frozen", "off"):
        set_ttt_mode(lm, mode)
        for scores in score(lm, [coded_group(lm, seed=seed) for seed in range(3)], lags=[40]):
            for matrix in scores[40]:
                assert torch.allclose(matrix, matrix[:1].expand_as(matrix), atol=1e-9)
                assert correct(matrix) == 1.0
    set_ttt_mode(lm, "on")
    (scores,) = score(lm, [coded_group(lm)], lags=[40])
    assert (scores[40].text - scores[40].text[:1]).abs().max() > 1e-4


def test_across_sessions_the_memory_is_all_that_comes_along():
    lm = ttt_lm()
    groups = [coded_group(lm, "one"), coded_group(lm, "two", seed=1)]
    for found in score(lm, groups, lags=[40], sessions=True):
        assert (found[40].text - found[40].text[:1]).abs().max() > 1e-4
    # Within the window too: attention of the first session is gone.
    set_ttt_mode(lm, "frozen")
    for found in score(lm, groups, lags=[5], sessions=True):
        assert torch.allclose(found[5].text, found[5].text[:1].expand_as(found[5].text), atol=1e-9)


def test_filler_goes_on_without_an_end_and_is_the_same_however_it_is_read(tiny_lm):
    group = coded_group(tiny_lm)
    whole = group.filler.frames(0, 100)
    again = coded_group(tiny_lm).filler
    assert torch.equal(torch.cat([again.frames(start, start + 4) for start in range(0, 100, 4)], 1), whole)
    assert whole.shape[1] == 100 and again.frames(7, 7).shape[1] == 0
    orders = {tuple(coded_group(tiny_lm, str(seed)).filler.frames(0, 21)[0].tolist()) for seed in range(9)}
    assert len(orders) == 2


@dataclass
class Heard(State):
    """How often each row has heard each text token, `[B, card]`."""

    counts: torch.Tensor

    def reset(self, reset_mask):
        super().reset(reset_mask)
        self.counts[reset_mask] = 0


class Remembering(LMModel):
    """Finds the text tokens likely that it has heard before, and knows nothing of the sound."""

    def _init_streaming_state(self, batch_size):
        return Heard(batch_size, self.device, torch.zeros(batch_size, self.text_card + 1))

    def forward_text(self, sequence, sum_condition=None, cross_attention_src=None):
        steps = F.one_hot(sequence[:, 0].clamp(min=0), self.text_card + 1).cumsum(1)  # [B, T, card]
        counts = self._streaming_state.counts[:, None] + steps
        self._streaming_state.counts.copy_(counts[:, -1])
        return counts, (counts[..., :-1] + 1e-3).log().log_softmax(-1)[:, None].double()

    def forward_depformer_training(self, sequence, transformer_out):
        batch, _, num_steps = sequence.shape
        return torch.zeros(batch, self.dep_q, num_steps, self.card)


def test_a_model_that_is_given_the_past_is_always_right():
    lm = make_tiny_lm().eval()
    groups = [coded_group(lm, str(seed), num=4, seed=seed) for seed in range(4)]
    groups = [replace(group, answers=[plant[:, 3:5].clone() for plant in group.plants]) for group in groups]
    for group in groups:
        for number, (plant, answer) in enumerate(zip(group.plants, group.answers, strict=True)):
            words = torch.arange(lm.text_card - 2 * number - 2, lm.text_card - 2 * number)
            plant[0, 3:5] = answer[0] = words  # nowhere else
    lm.__class__ = Remembering
    for found in score(lm, groups, lags=[5, 40, 400]):
        for scores in found.values():
            assert correct(scores.text) == 4.0
            assert correct(scores.text.roll(1, 1)) == 0.0
            assert correct(scores.audio) == 1.0  # all equal


def test_memory_does_not_grow_with_the_lag():
    lm, sizes = ttt_lm(), []
    for lag in (40, 2000):
        kept = []
        with patch.object(engine, "copy_stream", lambda model: kept.append(copy_stream(model)) or kept[-1]):  # noqa: B023
            score(lm, [coded_group(lm)], lags=[lag], chunk_frames=64)
        sizes.append([{name: tensor.shape for name, tensor in copied.items()} for copied in kept])
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2
