"""Losses along a recording: alignment, chunks, equality with Moshi's own forward, modes, own text."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from moshi.models.lm import LMGen, LMModel

from conftest import make_tiny_lm
from evaluation_helpers import FakeStream, nearly_equal, open_ttt, random_stream
from finetune.evaluation.long_context.measure import LossFiles, measure_recordings
from finetune.evaluation.long_context.stream_losses import delayed_codes, stream_losses
from finetune.monitoring.trajectories import StreamTrajectories, load_trajectories
from moshi_ttt.hybrid_model import set_ttt_mode, streaming_states, ttt_layers

WINDOW = 10
FLOAT32 = {"dtype": torch.float32, "context": WINDOW, "norm": "rms_norm_f32", "positional_embedding": "rope"}


def ttt_lm(**overrides):
    return open_ttt(make_tiny_lm(context=WINDOW, **overrides), non_ttt_layer_context=7)


# Text, two codebooks of the model and one of the user.
DELAYS = [1, 0, 2, 1]
START = 4
CODES = [
    [0, 1, 2, 3],
    [1, -1, 3, 0],
    [2, 2, 0, 1],
    [3, 0, 1, 2],
]
INPUTS = [  # step 0 to 5
    [START, START, 0, 1, 2, 3],
    [START, 1, -1, 3, 0, -1],
    [START, START, START, 2, 2, 0],
    [START, START, 3, 0, 1, 2],
]


class KnownModel(LMModel):
    """At step s, text token s mod 4 has probability 1/2, audio token (s + k) mod 4 of codebook k the same."""

    def forward_text(self, sequence, sum_condition=None, cross_attention_src=None):
        steps = torch.arange(len(self.heard), len(self.heard) + sequence.shape[2])
        self.heard += sequence[0].T.tolist()
        return steps.view(1, -1, 1), self.logits(steps)[None, None]

    def forward_depformer_training(self, sequence, transformer_out):
        steps = transformer_out[0, :, 0]
        self.predicted += sequence[0].T.tolist()
        return torch.stack([self.logits(steps + k) for k in range(self.dep_q)])[None]

    @staticmethod
    def logits(steps):
        likely = F.one_hot(steps % 4, 4).bool()
        return torch.where(likely, math.log(1 / 2), math.log(1 / 6))


@pytest.mark.parametrize("chunk_frames", [1, 2, 4, 100])
def test_losses_stand_at_the_frames_that_a_hand_computation_gives(chunk_frames):
    lm = make_tiny_lm(n_q=3, dep_q=2, delays=DELAYS, card=4, text_card=4).eval()
    lm.__class__, lm.heard, lm.predicted = KnownModel, [], []
    losses = stream_losses(lm, FakeStream("known", torch.tensor(CODES)), chunk_frames=chunk_frames)
    hit, miss, none = math.log(2), math.log(6), math.nan
    # Frame f of the text is predicted at step f + 1: tokens 1, 2, 3, 0 are likely, 0, 1, 2, 3 are there.
    text = [miss, miss, miss, miss]
    # Codebook 0 at step f: 0, 1, 2, 3 are likely; 1, none, 3, 0 are there.
    # Codebook 1 at step f + 2, one token on: 3, 0, 1, 2 are likely; 2, 2, 0, 1 are there.
    audio = [[miss, none, miss, miss], [miss, miss, miss, miss]]
    assert nearly_equal(losses.text, torch.tensor(text), 1e-6)
    assert nearly_equal(losses.audio, torch.tensor(audio), 1e-6)
    assert torch.tensor(lm.heard).T.tolist() == INPUTS
    # What step s predicts is what step s + 1 hears; after the last frame nothing is known.
    assert torch.tensor(lm.predicted).T.tolist() == [
        [START, 0, 1, 2, 3, -1],
        [1, -1, 3, 0, -1, -1],
        [START, START, 2, 2, 0, 1],
        [START, 3, 0, 1, 2, -1],
    ]
    assert hit not in losses.text.tolist()

    likely = torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2], [0, 0, 0, 0]])
    lm.heard, lm.predicted = [], []
    losses = stream_losses(lm, FakeStream("likely", likely), chunk_frames=chunk_frames)
    assert nearly_equal(losses.text, torch.full((4,), hit), 1e-6)
    assert nearly_equal(losses.audio, torch.full((2, 4), hit), 1e-6)


def forward_losses(lm, stream):
    """Text [N] and audio [K, N] of Moshi's own forward, NaN where that has no target."""
    codes = stream.codes[None]
    with torch.no_grad():
        out = lm(codes)
    rows = []
    for logits, mask, targets in (
        (out.text_logits, out.text_mask, codes[:, :1]),
        (out.logits, out.mask, codes[:, 1 : 1 + lm.dep_q]),
    ):
        loss = -torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[..., None])[0, ..., 0]
        rows.append(torch.where(mask[0], loss, math.nan))
    return rows[0][0], rows[1]


@pytest.mark.parametrize("chunk_frames", [1, 16, 25, 1000])
def test_losses_equal_those_of_moshis_forward(chunk_frames):
    lm = ttt_lm()
    stream = random_stream(lm, 60, user=True)
    stream.codes[0, 20:30] = stream.codes[3, 5] = -1
    text, audio = forward_losses(lm, stream)
    losses = stream_losses(lm, stream, chunk_frames=chunk_frames)
    assert nearly_equal(losses.text, text, 1e-5)
    assert losses.text.isnan().sum() == 10
    # Forward never predicts the last frame of the delayed codebooks; here only the zero token is no target.
    assert (audio[1:, -1].isnan()).all() and losses.audio.isnan().sum() == 1
    assert nearly_equal(losses.audio[:, :-1], audio[:, :-1], 1e-5)


def test_a_recording_without_text_and_user_has_no_text_loss_but_every_audio_target():
    lm = ttt_lm()
    stream = random_stream(lm, 50)
    stream.codes[0] = -1
    losses = stream_losses(lm, stream, chunk_frames=16)
    assert losses.text.isnan().all()
    assert nearly_equal(losses.audio[:, :-1], forward_losses(lm, stream)[1][:, :-1], 1e-5)
    metrics = losses.metrics()
    assert metrics["audio"].isfinite().all()
    assert torch.equal(metrics["semantic"], losses.audio[0])
    assert nearly_equal(metrics["acoustic"], losses.audio[1:].sum(0) / 7, 1e-5)
    assert nearly_equal(metrics["audio"], losses.audio.sum(0) / 8, 1e-5)


@pytest.mark.parametrize("chunk_frames", [1, 7, 64, 250])
@pytest.mark.parametrize("with_ttt", [True, False], ids=["ttt", "stock"])
def test_chunks_of_any_size_give_the_same_losses_far_beyond_the_window(chunk_frames, with_ttt):
    lm = open_ttt(make_tiny_lm(**FLOAT32)) if with_ttt else make_tiny_lm(**FLOAT32).eval()
    stream = random_stream(lm, 300)
    whole = stream_losses(lm, stream, chunk_frames=1000)
    parts = stream_losses(lm, stream, chunk_frames=chunk_frames)
    assert nearly_equal(parts.text, whole.text, 1e-4)
    assert nearly_equal(parts.audio, whole.audio, 1e-4)


def test_each_mode_of_the_memory_is_that_of_the_model():
    lm = ttt_lm()
    stream = random_stream(lm, 40)
    losses = {}
    for mode in ("on", "frozen", "off"):
        set_ttt_mode(lm, mode)
        losses[mode] = stream_losses(lm, stream, chunk_frames=16).audio
        assert nearly_equal(losses[mode][:, :-1], forward_losses(lm, stream)[1][:, :-1], 1e-5)
    assert (losses["on"] - losses["frozen"]).abs().max() > 1e-3
    assert (losses["frozen"] - losses["off"]).abs().max() > 1e-3
    stock = make_tiny_lm(context=WINDOW).eval()
    for layer in (0, 2):
        stock.transformer.layers[layer].self_attn.context = 7
    assert torch.equal(losses["off"], stream_losses(stock, stream, chunk_frames=16).audio)


def test_a_loss_does_not_change_when_its_future_does():
    lm = ttt_lm()
    stream = random_stream(lm, 40)
    changed = FakeStream("changed", stream.codes.clone())
    changed.codes[:9, 30] = (changed.codes[:9, 30] + 1) % 20
    before, after = (stream_losses(lm, s, chunk_frames=16) for s in (stream, changed))
    assert torch.equal(before.audio[:, :29], after.audio[:, :29])
    assert torch.equal(before.text[:30], after.text[:30])
    assert not torch.equal(before.text[31:], after.text[31:])


def test_the_models_own_text_is_what_its_generator_would_write_greedily():
    lm = ttt_lm()
    stream = random_stream(lm, 40, user=True)
    stream.codes[0] = -1
    written = []
    generator = LMGen(lm, use_sampling=False, on_text_hook=lambda token: written.append(int(token)))
    with generator.streaming(1):
        for step in range(40):
            # What the generator says in this step is replaced by what stands in the recording. What it
            # hears belongs to the frame before: in its first step that is the start token.
            said = delayed_codes(lm, stream, step, step + 1)[1 : 1 + lm.dep_q]
            heard = stream.codes[1 + lm.dep_q :, max(step - 1, 0), None]
            generator.step(heard[None], depformer_replace_tokens=said[None])
    own = stream_losses(lm, stream, chunk_frames=7, own_text=True)
    assert own.text.isnan().all()
    given = FakeStream("given", torch.cat([torch.tensor(written)[None], stream.codes[1:]]))
    expected = stream_losses(lm, given, chunk_frames=16)
    assert nearly_equal(own.audio[:, :-1], expected.audio[:, :-1], 1e-5)
    without = stream_losses(lm, stream, chunk_frames=16)
    assert not nearly_equal(own.audio, without.audio, 1e-3)


def test_progress_counts_the_steps_of_each_chunk_once_they_are_heard():
    lm = ttt_lm()
    seen = []

    def on_steps(num_steps):
        (state, _) = streaming_states(lm).values()
        seen.append((num_steps, int(state.num_tokens[0])))

    stream_losses(lm, random_stream(lm, 40), chunk_frames=16, on_steps=on_steps)
    assert seen == [(16, 16), (16, 32), (9, 41)]


def test_losses_that_are_not_finite_are_told_from_missing_targets():
    lm = ttt_lm()
    stream = random_stream(lm, 40)
    stream.codes[0] = stream.codes[4, 7] = -1
    good = stream_losses(lm, stream, chunk_frames=16)
    assert good.first_failure() is None and good.memory_resets == 0
    with torch.no_grad():
        lm.emb[2].weight[int(stream.codes[3, 10])] = math.nan
    bad = stream_losses(lm, stream, chunk_frames=1)
    first = int((stream.codes[3] == stream.codes[3, 10]).nonzero()[0])
    # Delayed by one frame, it is heard two steps later; the depth transformer has an embedding of its own.
    # The other delayed codebooks of the frame before are predicted in that step.
    assert bad.first_failure() == first + 1
    assert torch.equal(bad.audio[0].isinf().nonzero()[0], torch.tensor([first + 2]))
    assert bad.text.isnan().all() and bad.memory_resets > 0


def test_trajectories_are_those_of_the_pass_in_which_the_memory_learns(tmp_path):
    lm = ttt_lm()
    stream = random_stream(lm, 40)
    files = LossFiles(tmp_path / "streams", {}, own_text=False)
    files.folder.mkdir()
    settings = {"arms": ("on", "off"), "files": files, "trajectories": tmp_path / "inner"}
    (recording,) = measure_recordings(lm, [stream], chunk_frames=32, **settings).recordings
    (path,) = (tmp_path / "inner").iterdir()
    assert recording.trajectories == path
    found = load_trajectories(path)
    assert found.facts == {"recording": stream.name} and list(found.losses) == list(ttt_layers(lm))
    set_ttt_mode(lm, "on")
    whole = StreamTrajectories(lm)
    with whole.recording():
        stream_losses(lm, stream, chunk_frames=7)
    for index, losses in whole.losses().items():
        assert losses.shape == (3, 41)
        assert nearly_equal(found.losses[index], losses, 1e-5)


def test_trajectories_asked_for_later_are_measured_then(tmp_path):
    lm = ttt_lm()
    files = LossFiles(tmp_path, {}, own_text=False)
    settings = {"arms": ("on",), "files": files, "chunk_frames": 32}
    assert measure_recordings(lm, [random_stream(lm, 40)], **settings).recordings[0].trajectories is None
    for num_reused in (0, 1):
        measured = measure_recordings(
            lm, [random_stream(lm, 40)], trajectories=tmp_path / "inner", **settings
        )
        assert measured.num_reused == num_reused
        assert measured.recordings[0].trajectories.is_file()


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_the_first_half_hour():
    lm = open_ttt(make_tiny_lm(**FLOAT32), mini_batch_size=16)
    stream = random_stream(lm, 136_000)
    sizes = []

    def on_steps(num_steps):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    losses = stream_losses(lm, stream, chunk_frames=256, on_steps=on_steps)
    assert losses.audio.isfinite().all() and losses.memory_resets == 0
    assert max(sizes) - sizes[len(sizes) // 6] < 10, "MiB"
