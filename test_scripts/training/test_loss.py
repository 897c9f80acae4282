"""The loss: hand-computed, weights and masks, chunks cut up differently, unigram baseline."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import make_codes, make_tiny_lm
from finetune.args import TrainArgs, TTTArgs
from finetune.data.batches.chunks import Chunk
from finetune.data.batches.dataset import Batch
from finetune.eval import UnigramModel, evaluate
from finetune.loss import audio_targets, loss_sums, loss_weights, total_loss
from ttt_inputs import assert_close


class FixedChunks:
    """A data set of given codes."""

    def __init__(self, codes):
        self.codes = codes
        self.chunks = [Chunk(recording, 0, codes.shape[2]) for recording in range(len(codes))]

    def __len__(self):
        return len(self.codes)

    def batch(self, indices):
        zeros = torch.zeros(len(indices), dtype=torch.long)
        return Batch(self.codes[list(indices)], torch.tensor(indices), zeros, zeros)


def make_args(**overrides) -> TrainArgs:
    return TrainArgs(ttt=TTTArgs(enable=True), param_dtype="float32", **overrides)


def test_weights_agree_with_moshis_own_masks(tiny_lm):
    codes = make_codes(tiny_lm, 3, 9)
    codes[1, :, 6:] = -1
    codes[2, 0] = -1  # audio without text
    weights, output = loss_weights(codes, tiny_lm, make_args()), tiny_lm(codes)
    assert torch.equal(weights.text_valid, output.text_mask)
    assert torch.equal(weights.audio_valid, output.mask)


def test_text_loss_of_a_hand_computed_case(tiny_lm):
    # Two frames, the second is padding (3): weights 1 and 0.5, probabilities of the targets 1/4 and 1/2.
    codes = make_codes(tiny_lm, 1, 2)
    codes[0, 0] = torch.tensor([7, 3])
    output = tiny_lm(codes)
    logits = torch.full((1, 1, 2, 48), -math.inf)
    logits[0, 0, 0, [5, 6, 7, 8]] = 0.0
    logits[0, 0, 1, [3, 4]] = 0.0
    output.text_logits = logits
    weights = loss_weights(codes, tiny_lm, make_args(text_padding_weight=0.5))
    sums = loss_sums(output, codes, weights, tiny_lm)
    assert weights.text.tolist() == [[[1.0, 0.5]]]
    assert sums.text.item() == pytest.approx(math.log(4) + 0.5 * math.log(2))
    assert sums.text_nll.item() == pytest.approx(math.log(4) + math.log(2))
    assert sums.text_count.item() == 2


def test_audio_loss_is_the_weighted_mean_over_codebooks(tiny_lm):
    codes = make_codes(tiny_lm, 2, 9)
    weights = loss_weights(codes, tiny_lm, make_args(first_codebook_weight_multiplier=100.0))
    output = tiny_lm(codes)
    loss = total_loss(loss_sums(output, codes, weights, tiny_lm), weights.totals())
    total, weight = 0.0, 0.0
    for k in range(8):
        delay = tiny_lm.delays[1 + k]
        stop = 9 - delay
        factor = 100.0 if k == 0 else 1.0
        losses = F.cross_entropy(
            output.logits[:, k, :stop].flatten(0, 1).float(),
            audio_targets(codes, tiny_lm)[:, k, :stop].flatten(),
            reduction="sum",
        )
        total, weight = total + factor * losses.item(), weight + factor * 2 * stop
    text = F.cross_entropy(output.text_logits.flatten(0, 2).float(), codes[:, 0].flatten(), reduction="none")
    text_weights = torch.where((codes[:, 0] == 3) | (codes[:, 0] == 0), 0.5, 1.0).flatten()
    expected = total / weight + (text * text_weights).sum().item() / text_weights.sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_finite_although_moshi_fills_invalid_logits_with_nan(tiny_lm):
    codes = make_codes(tiny_lm, 2, 9)
    codes[1, :, 5:] = -1
    output = tiny_lm(codes)
    assert output.logits.isnan().any()
    weights = loss_weights(codes, tiny_lm, make_args())
    total_loss(loss_sums(output, codes, weights, tiny_lm), weights.totals()).backward()
    assert all(p.grad.isfinite().all() for p in tiny_lm.parameters() if p.grad is not None)


def test_padded_frames_do_not_count():
    lm = make_tiny_lm().eval()
    codes = make_codes(lm, 1, 9)
    padded = torch.cat([codes, torch.full((1, 17, 5), -1)], 2)
    for k in range(8):
        if lm.delays[1 + k]:
            codes[:, 1 + k, -1] = -1  # what the shorter chunk never predicts
            padded[:, 1 + k, 8] = -1
    args, results = make_args(), []
    with torch.no_grad():
        for batch in (codes, padded):
            weights = loss_weights(batch, lm, args)
            results.append((*loss_sums(lm(batch), batch, weights, lm)[:2], weights.totals()))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)


def test_evaluation_does_not_depend_on_the_batching_and_perplexity_is_exp_of_the_plain_mean():
    lm = make_tiny_lm(dtype=torch.float32).eval()
    codes = make_codes(lm, 5, 9)
    codes[4, :, 4:] = -1

    one, two, five = (
        evaluate(
            lm,
            FixedChunks(codes),
            make_args(batch_size=size, text_padding_weight=0.1, first_codebook_weight_multiplier=7.0),
            device=torch.device("cpu"),
        )
        for size in (1, 2, 5)
    )
    for name, value in one.items():
        assert value == pytest.approx(two[name], rel=1e-5) == pytest.approx(five[name], rel=1e-5)
    with torch.no_grad():
        output = lm(codes)
    valid = codes[:, 0] != -1
    nll = F.cross_entropy(output.text_logits[:, 0][valid].float(), codes[:, 0][valid])
    assert one["text_perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert one["loss"] == pytest.approx(one["text_loss"] + one["audio_loss"])


def test_a_loss_without_targets_is_nan_and_not_zero():
    lm = make_tiny_lm(dtype=torch.float32).eval()
    codes = make_codes(lm, 1, 9)
    codes[:, 0] = -1
    result = evaluate(lm, FixedChunks(codes), make_args(), device=torch.device("cpu"))
    assert math.isnan(result["text_loss"]) and result["audio_loss"] > 0


def test_unigram_probabilities_are_smoothed_frequencies():
    text = torch.tensor([3.0, 1.0, 0.0, 0.0])
    unigram = UnigramModel(text, torch.zeros(8, 5))
    assert_close(unigram.text_log_probs.exp(), torch.tensor([4.0, 2.0, 1.0, 1.0]) / 8, 1e-6)
    assert_close(unigram.audio_log_probs.exp(), torch.full((8, 5), 0.2), 1e-6)
