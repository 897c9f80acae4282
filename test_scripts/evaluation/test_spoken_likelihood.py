"""Likelihood of spoken items: a hand computation, batches, prompts, the model's own text, failures."""

import math

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel

from conftest import make_codes, make_tiny_lm
from evaluation_helpers import FakeStream, open_ttt
from finetune.evaluation.long_context.stream_losses import stream_losses
from finetune.evaluation.spoken import measure
from finetune.evaluation.spoken.accuracy import item_scores
from finetune.evaluation.spoken.likelihood import score_items
from finetune.evaluation.spoken.measure import EncodedPairs
from moshi_ttt.hybrid_model import set_ttt_mode, ttt_layers

LENGTHS = [7, 1, 12, 3, 9]
ONE_BY_ONE = {"batch_size": 1, "max_frames_per_batch": 1}
BATCHED = {"batch_size": 3, "max_frames_per_batch": 1000}


def ttt_lm(**overrides):
    return open_ttt(make_tiny_lm(context=5, **overrides))  # shorter than most items


def random_items(lm, lengths=LENGTHS, *, own_text=False, seed=0):
    """Items whose text and user are zero tokens."""
    items = []
    for index, length in enumerate(lengths):
        codes = make_codes(lm, 1, length, seed=seed + index)[0]
        codes[0] = lm.ungenerated_token_id if own_text else lm.zero_token_id
        codes[1 + lm.dep_q :] = lm.zero_token_id
        items.append(codes)
    return items


def values(scores):
    return torch.stack([score.log_likelihood for score in scores])


class KnownModel(LMModel):
    """At step s the token (s + k) mod 4 of codebook k has probability 1/2, the other three 1/6 each."""

    def forward_text(self, sequence, sum_condition=None, cross_attention_src=None):
        self.heard = sequence[0].tolist()
        steps = torch.arange(sequence.shape[2]).view(1, -1, 1)
        return steps, torch.zeros(1, 1, sequence.shape[2], 4)

    def forward_depformer_training(self, sequence, transformer_out):
        steps = transformer_out[0, :, 0]
        likely = torch.stack([F.one_hot((steps + k) % 4, 4).bool() for k in range(self.dep_q)])[None]
        return torch.where(likely, math.log(1 / 2), math.log(1 / 6))


# Three frames, Moshi's delays: the first codebook of each voice at once, the others a frame later.
DELAYS = [0, *(0, 1, 1), *(0, 1, 1)]
START = 4
CODES = [
    [-1, -1, -1],
    [0, 3, 2],
    [2, 3, -1],
    [1, 3, 1],
    [-1, -1, -1],
    [-1, -1, -1],
    [-1, -1, -1],
]


def test_three_frames_have_the_likelihood_of_a_hand_computation():
    lm = make_tiny_lm(n_q=6, dep_q=3, delays=DELAYS, card=4, text_card=4).eval()
    lm.__class__ = KnownModel
    (score,) = score_items(lm, [torch.tensor(CODES)], **ONE_BY_ONE)
    hit, miss = math.log(1 / 2), math.log(1 / 6)
    # Codebook 0 is predicted in steps 0 to 2, where 0, 1, 2 are likely: 0 hits, 3 misses, 2 hits.
    # Codebook 1 in steps 1 to 3, one token on: 2, 3, 0 are likely; 2 and 3 hit, the last frame has none.
    # Codebook 2 in steps 1 to 3, two tokens on: 3, 0, 1 are likely: 1 misses, 3 misses, 1 hits.
    expected = [2 * hit + miss, 2 * hit, hit + 2 * miss]
    assert score.log_likelihood.dtype == torch.float64
    assert torch.allclose(score.log_likelihood, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert score.num_tokens.tolist() == [3, 2, 3] and score.num_frames == 3
    # What the model hears: the start, then each codebook with its delay; the fourth step predicts the rest.
    assert lm.heard == [
        [START, -1, -1, -1],
        [START, 0, 3, 2],
        [START, START, 2, 3],
        [START, START, 1, 3],
        [START, -1, -1, -1],
        [START, START, -1, -1],
        [START, START, -1, -1],
    ]


@pytest.mark.parametrize("own_text", [False, True])
def test_scores_are_the_losses_of_streaming_each_item_by_itself(own_text):
    lm = ttt_lm()
    items = random_items(lm, own_text=own_text)
    scores = score_items(lm, items, **BATCHED)
    for codes, score in zip(items, scores, strict=True):
        heard = codes.clone()
        heard[0] = lm.zero_token_id
        losses = stream_losses(lm, FakeStream("item", heard), chunk_frames=5, own_text=own_text).audio
        assert torch.allclose(score.log_likelihood, -losses.double().sum(1), rtol=0, atol=1e-4)
        assert score.num_tokens.tolist() == [codes.shape[1]] * lm.dep_q


def test_own_text_counts():
    lm = ttt_lm()
    empty = values(score_items(lm, random_items(lm), **BATCHED))
    own = values(score_items(lm, random_items(lm, own_text=True), **BATCHED))
    assert (empty - own).abs().max() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("own_text", [False, True])
def test_batch_size_order_and_padding_change_nothing(dtype, tolerance, own_text):
    lm = ttt_lm(dtype=dtype)
    items = random_items(lm, own_text=own_text)
    alone = values(score_items(lm, items, **ONE_BY_ONE))
    assert (alone[0] - alone[4]).abs().max() > 1e-2  # items differ
    for limits in (BATCHED, {"batch_size": 5, "max_frames_per_batch": 30}):
        assert (values(score_items(lm, items, **limits)) - alone).abs().max() < tolerance
    backwards = values(score_items(lm, items[::-1], **BATCHED)).flip(0)
    assert (backwards - alone).abs().max() < tolerance
    short = values(score_items(lm, [items[1], items[2]], **BATCHED))  # 11 frames of padding
    assert (short[0] - alone[1]).abs().max() < tolerance


def test_the_same_codes_score_exactly_the_same_and_once(monkeypatch):
    lm = ttt_lm()
    once = random_items(lm, [7, 1, 12, 3, 9, 7, 5])
    codes = {f"{name}{index}": row.clone() for name in "ab" for index, row in enumerate(once)}
    scored, original = [], measure.score_items
    monkeypatch.setattr(
        measure, "score_items", lambda lm, rows, **limits: scored.extend(rows) or original(lm, rows, **limits)
    )
    for limits in (BATCHED, {"batch_size": 4, "max_frames_per_batch": 40}):
        scored.clear()
        found = measure.measure_items(lm, EncodedPairs("swuggy", [], codes, {}), semantic_weight=10, **limits)
        assert len(scored) == len(once) and list(found.scores) == list(codes)
        for index, row in enumerate(once):
            assert found.scores[f"a{index}"] == found.scores[f"b{index}"]
            alone = item_scores(score_items(lm, [row], **ONE_BY_ONE)[0], semantic_weight=10)
            assert found.scores[f"a{index}"] == pytest.approx(alone, abs=1e-3)
        assert len({scores["combined"] for scores in found.scores.values()}) == len(once)


def test_batches_keep_both_limits_and_longer_items_are_alone(monkeypatch):
    lm = make_tiny_lm().eval()
    shapes, forward = [], LMModel.forward

    def recorded(self, codes, conditions):
        shapes.append(codes.shape)
        return forward(self, codes, conditions)

    monkeypatch.setattr(LMModel, "forward", recorded)
    counts = []
    limits = {"batch_size": 2, "max_frames_per_batch": 24, "on_items": counts.append}
    scores = score_items(lm, random_items(lm, [30, 5, 5, 5, 11, 12]), **limits)
    # Steps are frames and the largest delay, 1.
    assert [(shape[0], shape[2]) for shape in shapes] == [(1, 31), (1, 13), (2, 12), (2, 6)]
    assert [score.num_frames for score in scores] == [30, 5, 5, 5, 11, 12]
    assert counts == [1, 1, 2, 2]
    assert all(score.seconds > 0 for score in scores)


@pytest.mark.parametrize("own_text", [False, True])
def test_a_prompt_is_heard_before_every_item_and_does_not_count(own_text):
    lm = ttt_lm()
    prompt, *items = random_items(lm, [11, *LENGTHS], own_text=own_text, seed=50)
    scores = score_items(lm, items, prompt=prompt, **BATCHED)
    for codes, score in zip(items, scores, strict=True):
        whole = torch.cat([prompt, codes], 1)
        whole[0] = lm.zero_token_id
        losses = stream_losses(lm, FakeStream("both", whole), chunk_frames=5, own_text=own_text).audio
        assert torch.allclose(score.log_likelihood, -losses[:, 11:].double().sum(1), rtol=0, atol=1e-4)
        assert score.num_frames == codes.shape[1]
    assert (values(scores) - values(score_items(lm, items, **BATCHED))).abs().max() > 1e-2


def test_memory_hears_what_attention_no_longer_reaches():
    lm = open_ttt(make_tiny_lm(context=3), non_ttt_layer_context=3, ttt_layer_context=3)
    prompt, item = random_items(lm, [40, 6])
    other = prompt.clone()
    other[1 : 1 + lm.dep_q, :8] = (other[1 : 1 + lm.dep_q, :8] + 1) % lm.card

    def difference():
        scores = [score_items(lm, [item], prompt=heard, **BATCHED) for heard in (prompt, other)]
        return (values(scores[0]) - values(scores[1])).abs().max()

    assert difference() > 1e-6
    set_ttt_mode(lm, "frozen")
    assert difference() == 0


def test_an_item_that_is_not_finite_is_a_failure_and_spoils_no_other():
    lm = make_tiny_lm().eval()
    codes = [row % (lm.card - 1) for row in random_items(lm)]
    for row in codes:
        row[0], row[1 + lm.dep_q :] = lm.zero_token_id, lm.zero_token_id
    codes[2][1, 4] = lm.card - 1
    lm.emb[0].weight.data[lm.card - 1] = math.nan
    by_name = {f"item{index}": row for index, row in enumerate(codes)}
    encoded = EncodedPairs("swuggy", [], by_name, {"lost": "cannot be read"})
    found = measure.measure_items(lm, encoded, semantic_weight=10, **BATCHED)
    assert found.failures == {
        "lost": "cannot be read",
        "item2": "its log-likelihood under the model is not finite",
    }
    assert list(found.scores) == ["item0", "item1", "item3", "item4"]
    alone = score_items(lm, codes[:2], **ONE_BY_ONE)
    scored = [found.likelihoods[name] for name in ("item0", "item1")]
    assert (values(scored) - values(alone)).abs().max() < 1e-9


@pytest.mark.parametrize("own_text", [False, True])
def test_memory_that_is_not_finite_is_no_score(own_text):
    lm = ttt_lm()
    items = random_items(lm, own_text=own_text)
    assert values(score_items(lm, items, **BATCHED)).isfinite().all()
    # While streaming, such a memory is given up and the model goes on: that is no score either.
    ttt_layers(lm)[1].weights[0].data[0, 0, 0] = math.inf
    assert not values(score_items(lm, items, **BATCHED)).isfinite().all(1).any()


def test_the_user_does_not_count_even_where_the_model_predicts_it():
    lm = make_tiny_lm(dep_q=16).eval()
    codes = make_codes(lm, 1, 5)[0]
    (score,) = score_items(lm, [codes], **BATCHED)
    losses = stream_losses(lm, FakeStream("item", codes), chunk_frames=5).audio
    assert score.num_tokens.tolist() == [5] * 8
    assert torch.allclose(score.log_likelihood, -losses[:8].double().sum(1), rtol=0, atol=1e-4)


def test_codes_that_do_not_fit_are_refused():
    lm = make_tiny_lm().eval()
    with pytest.raises(ValueError, match=r"must be \[17, N\]"):
        score_items(lm, [torch.zeros(16, 3, dtype=torch.long)], **BATCHED)
    with pytest.raises(ValueError, match="N >= 1"):
        score_items(lm, [torch.zeros(17, 0, dtype=torch.long)], **BATCHED)
    assert score_items(lm, [], **BATCHED) == []
