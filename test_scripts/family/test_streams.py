"""Which streams a model has follows from its configuration, and losses, metrics and voices follow them."""

import math

import numpy as np
import pytest
import torch

from conftest import make_codes, make_tiny_lm
from finetune.args import TrainArgs
from finetune.base_model.streams import (
    Streams,
    make_trainable,
    model_streams,
    speak_only,
    streams_of,
    text_delay_frames,
)
from finetune.data.codes.mono import Voices
from finetune.data.recordings.lines import Recording
from finetune.data.words import Word, delayed
from finetune.eval import LossAverage
from finetune.loss import loss_sums, loss_weights, total_loss

TRANSCRIBER = {"n_q": 4, "dep_q": 0, "delays": [0] * 5}
BOTH = {"n_q": 8, "dep_q": 8, "delays": [0, *[0, 1, 1, 1] * 2], "depformer_context": 8}


@pytest.mark.parametrize(
    ("n_q", "dep_q", "streams"),
    [
        (16, 8, Streams(8, 2, 1)),
        (16, 16, Streams(8, 2, 2)),
        (32, 0, Streams(32, 1, 0)),
        (32, 16, Streams(16, 2, 1)),
    ],
)
def test_voices_and_codebooks_follow_from_the_numbers_of_codebooks(n_q, dep_q, streams):
    assert streams_of(n_q=n_q, dep_q=dep_q) == streams


@pytest.mark.parametrize(("n_q", "dep_q"), [(0, 0), (9, 9), (16, 4), (8, 16)])
def test_other_numbers_of_codebooks_are_refused(n_q, dep_q):
    with pytest.raises(ValueError, match="are not the streams"):
        streams_of(n_q=n_q, dep_q=dep_q)


def test_the_text_delay_is_that_of_the_configuration_in_frames():
    assert text_delay_frames({"stt_config": {"audio_delay_seconds": 0.5}}) == 6
    assert text_delay_frames({"stt_config": {}}) == text_delay_frames({}) == 0


def losses(lm, **settings):
    codes = make_codes(lm, 2, 9)
    weights = loss_weights(codes, lm, TrainArgs(full_finetuning=True, **settings))
    sums = loss_sums(lm(codes), codes, weights, lm)
    return codes, weights, sums


def test_a_model_that_writes_text_only_has_the_loss_of_its_text():
    lm = make_trainable(make_tiny_lm(**TRANSCRIBER))
    codes, weights, sums = losses(lm, text_padding_weight=1.0)
    expected = torch.nn.functional.cross_entropy(
        lm(codes).text_logits.flatten(0, 2).float(), codes[:, :1].flatten()
    )
    total = total_loss(sums, weights.totals())
    torch.testing.assert_close(total, expected.to(total.dtype))
    total.backward()
    assert lm.emb[0].weight.grad.abs().sum() > 0
    average = LossAverage()
    average.add(sums, weights)
    result = average.result(model_streams(lm))
    assert result["loss"] == pytest.approx(expected.item()) and math.isnan(result["semantic_loss"])


def test_the_first_codebook_of_each_predicted_voice_is_semantic():
    lm = make_tiny_lm(**BOTH)
    _, weights, sums = losses(lm, first_codebook_weight_multiplier=7.0)
    inside = weights.audio[:, :, :-1]  # the last frame of delayed codebooks is never predicted
    assert inside[:, [0, 4]].unique().tolist() == [7.0]
    assert inside[:, [1, 2, 3, 5, 6, 7]].unique().tolist() == [1.0]
    average = LossAverage()
    average.add(sums, weights)
    result = average.result(model_streams(lm))
    semantic = (sums.audio_nll[[0, 4]].sum() / sums.audio_count[[0, 4]].sum()).item()
    assert result["semantic_loss"] == pytest.approx(semantic)


@torch.no_grad()
def test_a_model_that_predicts_both_voices_speaks_with_the_same_probabilities():
    lm = make_tiny_lm(**BOTH).eval()
    codes = make_codes(lm, 2, 9)
    whole = lm(codes)
    alone = speak_only(lm)(codes)
    assert model_streams(lm) == Streams(4, 2, 1)
    torch.testing.assert_close(alone.logits, whole.logits[:, :4], rtol=0, atol=1e-12, equal_nan=True)
    assert torch.equal(alone.text_logits, whole.text_logits)


class Codes:
    """Ten frames of two codebooks; of stereo, the right channel counts from 100 on."""

    num_codebooks = 2

    def __init__(self, channels):
        self.all = (
            torch.arange(10).repeat(2 * channels, 1)
            + 100 * torch.arange(channels).repeat_interleave(2)[:, None]
        )

    def num_frames(self, recording):
        return 10

    def load(self, recording, start_frame=0, num_frames=None):
        stop = 10 if num_frames is None else start_frame + num_frames
        assert stop <= 10
        return self.all[:, start_frame:stop]


@pytest.mark.parametrize("channels", [1, 2])
def test_one_voice_is_a_mono_recording_or_the_left_channel_and_silence_after_its_end(tmp_path, channels):
    recording = Recording(tmp_path / "a.wav", 1.0, tmp_path / "a.json")
    silence = torch.tensor([[70, 71, 72], [80, 81, 82]])
    voices = Voices(Codes(channels), "one_voice", silence=silence)
    assert voices.load(recording)[0].tolist() == list(range(10))
    assert voices.load(recording, 8, 4).tolist() == [[8, 9, 70, 71], [8, 9, 80, 81]]
    assert voices.load(recording, 11, 2).tolist() == [[71, 72], [81, 82]]


def test_words_are_delayed_but_those_before_the_start_stay_there():
    words = [Word("gone", -0.2, 0.1), Word("here", 0.0, 0.3)]
    assert delayed(words, 0.5) == [Word("gone", -0.2, 0.1), Word("here", 0.5, 0.8)]
    assert np.isclose(delayed(words, 0.0)[1].start_sec, 0)
