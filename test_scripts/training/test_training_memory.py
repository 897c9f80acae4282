"""Chunks that go on from carried memory are one pass over the recording, whose attention restarts."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint
from moshi.models.lm import _delay_sequence
from moshi.modules.transformer import StreamingTransformerLayer
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import cross_entropy

from conftest import make_codes, make_tiny_lm
from finetune.args import TrainArgs, TTTArgs
from finetune.data.batches.chunks import build_index
from finetune.data.batches.dataset import Batch
from finetune.eval import evaluate
from finetune.loss import audio_targets, loss_weights
from finetune.training.carried_memory import CarriedMemory
from finetune.training.run import run_training
from finetune.ttt_integration import apply_ttt_to_model
from finetune.wrapped_model import context_frames
from moshi_ttt.hybrid_model import ttt_layers
from run_helpers import read_metrics, run_args
from ttt_inputs import assert_close

DELAYS = [0, *(0, 1, 1, 2, 1, 1, 1, 1), *(0, 1, 1, 1, 1, 1, 1, 1)]
T = 10
ARGS = TrainArgs(
    ttt=TTTArgs(enable=True, layers="1,3", mini_batch_size=4, initial_gating_alpha=0.5, base_lr=5.0),
    param_dtype="float32",
    duration_sec=T * 0.08,
)


def make_model(*, ttt=ARGS.ttt, **overrides):
    # Without absolute positions, which would start again in each chunk.
    lm = make_tiny_lm(delays=DELAYS, positional_embedding="none", **overrides)
    torch.manual_seed(0)
    apply_ttt_to_model(lm, ttt)
    return lm


def chunk_batches(codes, *, num_context):
    """The chunks of recordings of one length as batches, rows side by side."""
    length = codes.shape[2]
    for chunk in build_index([length], chunk_frames=T):
        start = max(0, chunk.start_frame - num_context)
        padded = torch.full((len(codes), codes.shape[1], num_context + T), -1)
        part = codes[:, :, start : chunk.start_frame + chunk.num_frames]
        padded[:, :, : part.shape[2]] = part
        rows = torch.full((len(codes),), chunk.start_frame)
        yield Batch(padded, torch.arange(len(codes)), rows, rows - start)


def memory_of(lm):
    return CarriedMemory(lm, torch.device("cpu"), chunk_frames=T)


def logits_of_chunks(lm, codes):
    """Text logits of every frame of the recordings, chunk by chunk, `[B, N, text_card]`."""
    memory, logits = memory_of(lm), []
    for batch in chunk_batches(codes, num_context=context_frames(lm)):
        with memory.carried(range(len(codes)), batch):
            text = lm(batch.codes).text_logits[:, 0]
        memory.commit()
        logits += [torch.stack([row[c : c + T] for row, c in zip(text, batch.context.tolist(), strict=True)])]
    return torch.cat(logits, 1)[:, : codes.shape[2]]


def logits_of_one_pass(lm, codes):
    """The same, layer by layer over the whole recording: attention per chunk, TTT over everything at once."""
    initial = lm._get_initial_token().expand(len(codes), -1, -1)
    passes, firsts = [], []
    for batch in chunk_batches(codes, num_context=context_frames(lm)):
        delayed = torch.cat([initial, _delay_sequence(lm.delays, batch.codes, initial)], 2)[:, :, :-1]
        embedded = lm.text_emb(delayed[:, 0]) + sum(emb(delayed[:, 1 + k]) for k, emb in enumerate(lm.emb))
        firsts.append(batch.context[0].item())
        passes.append(embedded[:, : firsts[-1] + T])
    for layer in lm.transformer.layers:
        passes = [layer._sa_block(x) for x in passes]
        if hasattr(layer, "ttt"):
            passes = add_ttt(layer, passes, firsts)
        passes = [StreamingTransformerLayer._ff_block(layer, x) for x in passes]
    heard = torch.cat([x[:, first:] for x, first in zip(passes, firsts, strict=True)], 1)
    return lm.text_linear(lm.out_norm(heard))[:, : codes.shape[2]]


def add_ttt(layer, passes, firsts):
    """What the chunks' frames learn in one pass, and what their context reads at the start of the chunk."""
    heard = [x[:, first:] for x, first in zip(passes, firsts, strict=True)]
    learned = layer.ttt(torch.cat(heard, 1)).split(T, 1)
    results = []
    for number, (x, first) in enumerate(zip(passes, firsts, strict=True)):
        update = learned[number]
        if first:
            before = torch.cat([*heard[:number], x[:, :first]], 1)
            mask = torch.ones(before.shape[:2], dtype=torch.bool)
            mask[:, -first:] = False
            with layer.ttt.passing(token_mask=mask):
                update = torch.cat([layer.ttt(before)[:, -first:], update], 1)
        gating = layer.forward_ssm_gating
        results.append(gating.add_gated(x, gating(update)))
    return results


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [30, 37])
def test_chunks_through_the_model_equal_one_pass_whose_attention_restarts(num_frames):
    lm = make_model().eval()
    codes = make_codes(lm, 2, num_frames)
    assert_close(logits_of_chunks(lm, codes), logits_of_one_pass(lm, codes), 1e-12)


@torch.no_grad()
def test_with_attention_to_itself_only_chunks_equal_one_pass_of_the_whole_model():
    lm = make_model(context=1).eval()
    codes = make_codes(lm, 2, 37)
    assert_close(logits_of_chunks(lm, codes), lm(codes).text_logits[:, 0], 1e-12)


@torch.no_grad()
def test_rotary_positions_inside_a_mini_batch_go_on_over_chunks():
    ttt = TTTArgs(
        enable=True, layers="1,3", mini_batch_size=4, initial_gating_alpha=0.5, base_lr=5.0, use_rope=True
    )
    lm = make_model(ttt=ttt, context=1).eval()
    codes = make_codes(lm, 2, 37)
    # The tables of the rotation are float32.
    assert_close(logits_of_chunks(lm, codes), lm(codes).text_logits[:, 0], 1e-6)


def test_the_first_frame_of_a_chunk_has_the_input_that_it_has_in_the_recording():
    lm = make_model()
    codes = make_codes(lm, 1, 35)
    initial = lm._get_initial_token()
    whole = torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], 2)
    for batch in chunk_batches(codes, num_context=context_frames(lm)):
        start, first = batch.start_frame.item(), batch.context.item()
        inputs = torch.cat([initial, _delay_sequence(lm.delays, batch.codes, initial)], 2)
        num_frames = min(T, 35 - start)
        assert torch.equal(inputs[:, :, first : first + num_frames], whole[:, :, start : start + num_frames])


def count_targets(lm, codes):
    """How often each frame of each predicted codebook is a target, text first, `[B, 1 + K, N]`."""
    counts = torch.zeros(len(codes), 1 + lm.dep_q, codes.shape[2], dtype=torch.long)
    for batch in chunk_batches(codes, num_context=context_frames(lm)):
        weights = loss_weights(batch.codes, lm, ARGS, batch.context)
        start = (batch.start_frame - batch.context)[0].item()
        valid = torch.cat([weights.text_valid, weights.audio_valid], 1)[:, :, : codes.shape[2] - start]
        counts[:, :, start : start + valid.shape[2]] += valid
    return counts


def test_every_target_counts_once():
    lm = make_model()
    assert (count_targets(lm, make_codes(lm, 1, 35)) == 1).all()


def test_a_recording_of_whole_chunks_loses_the_delayed_end_as_one_pass_does():
    lm = make_model()
    codes = make_codes(lm, 1, 3 * T)
    counts = count_targets(lm, codes)
    whole = loss_weights(codes, lm, ARGS)
    assert torch.equal(counts.bool(), torch.cat([whole.text_valid, whole.audio_valid], 1))
    assert counts.max() == 1


@torch.no_grad()
def test_losses_of_chunks_are_those_of_the_whole_recording_frame_by_frame():
    lm = make_model(context=1).eval()
    codes = make_codes(lm, 2, 35)
    expected = cross_entropy(
        lm(codes).logits.permute(0, 3, 1, 2).float(), audio_targets(codes, lm), reduction="none"
    )  # NaN at the delayed end, which one pass does not predict
    found = torch.full_like(expected, torch.nan)
    memory = memory_of(lm)
    for batch in chunk_batches(codes, num_context=context_frames(lm)):
        with memory.carried(range(2), batch):
            logits = lm(batch.codes).logits
        memory.commit()
        valid = loss_weights(batch.codes, lm, ARGS, batch.context).audio_valid
        targets = torch.where(valid, audio_targets(batch.codes, lm), 0)
        losses = cross_entropy(logits.permute(0, 3, 1, 2).float(), targets, reduction="none")
        start = (batch.start_frame - batch.context)[0].item()
        width = min(valid.shape[2], 35 - start)
        part = found[:, :, start : start + width]
        part[valid[:, :, :width]] = losses[:, :, :width][valid[:, :, :width]]
    assert found.isfinite().all()
    known = expected.isfinite()
    assert_close(found[known], expected[known], 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_w0_in_every_chunk(checkpointing):
    lm = make_model(gradient_checkpointing=checkpointing)
    memory = memory_of(lm)
    for batch in chunk_batches(make_codes(lm, 2, 35), num_context=context_frames(lm)):
        lm.zero_grad()
        with memory.carried(range(2), batch):
            lm(batch.codes).text_logits.square().sum().backward()
        memory.commit()
        for layer in ttt_layers(lm).values():
            assert all(weight.grad.abs().max() > 0 for weight in (*layer.weights, *layer.biases))


def test_gradient_checkpointing_changes_neither_gradients_nor_memory():
    results = []
    for checkpointing in (False, True):
        lm = make_model(gradient_checkpointing=checkpointing)
        memory = memory_of(lm)
        lm.zero_grad()
        for batch in chunk_batches(make_codes(lm, 2, 35), num_context=context_frames(lm)):
            with memory.carried(range(2), batch):
                lm(batch.codes).text_logits.square().sum().backward()
            memory.commit()
        gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        results.append(gradients | memory.tensors())
    first, second = results
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@torch.no_grad()
def test_a_row_that_starts_a_recording_equals_a_fresh_model_whatever_its_lane_heard_before():
    lm = make_model().eval()
    num_context = context_frames(lm)
    old = list(chunk_batches(make_codes(lm, 1, 3 * T), num_context=num_context))
    start = next(chunk_batches(make_codes(lm, 1, T, seed=9), num_context=num_context))
    memory, fresh = memory_of(lm), memory_of(lm)
    for batch in old[:2]:
        for lane in (4, 7):
            with memory.carried([lane], batch):
                lm(batch.codes)
            memory.commit()
    both = Batch(*(torch.cat(pair) for pair in zip(start[:4], old[2][:4], strict=True)))
    with memory.carried([4, 7], both):
        logits = lm(both.codes).text_logits
    memory.commit()
    with fresh.carried([0], start):
        expected = lm(start.codes).text_logits
    fresh.commit()
    assert_close(logits[:1], expected, 1e-12)
    assert_close(expected[:, :, :T], lm(start.codes[:, :, :T]).text_logits, 1e-12)
    for name, tensor in fresh.tensors().items():
        assert_close(memory.tensors()["4" + name.removeprefix("0")], tensor, 1e-12)


class RecordedCodes:
    """A data set of recordings of given codes and lengths."""

    def __init__(self, codes, lengths, *, num_context):
        self.codes, self.num_context = codes, num_context
        self.chunks = build_index(lengths, chunk_frames=T)

    def __len__(self):
        return len(self.chunks)

    def batch(self, indices):
        chunks = [self.chunks[index] for index in indices]
        codes = torch.full((len(chunks), self.codes.shape[1], self.num_context + T), -1)
        contexts = [min(self.num_context, chunk.start_frame) for chunk in chunks]
        for row, chunk, context in zip(codes, chunks, contexts, strict=True):
            stop = chunk.start_frame + chunk.num_frames
            part = self.codes[chunk.recording, :, chunk.start_frame - context : stop]
            row[:, : part.shape[1]] = part
        starts = [chunk.start_frame for chunk in chunks]
        recordings = [chunk.recording for chunk in chunks]
        return Batch(codes, *(torch.tensor(column) for column in (recordings, starts, contexts)))


def evaluated(lm, data, **changes):
    return evaluate(lm, data, replace(ARGS, **changes), device=torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_carries_memory_and_does_not_depend_on_the_rows(checkpointing):
    lm = make_model(dtype=torch.float32, gradient_checkpointing=checkpointing)
    codes = make_codes(lm, 5, 47)
    data = RecordedCodes(codes, [35, 47, 4, 10, 21], num_context=context_frames(lm))
    one, two, many = (evaluated(lm, data, batch_size=size) for size in (1, 2, 9))
    for name, value in one.items():
        assert value == pytest.approx(two[name], rel=1e-5) == pytest.approx(many[name], rel=1e-5)
    fresh = RecordedCodes(codes, [35, 47, 4, 10, 21], num_context=0)
    without = evaluated(lm, fresh, batch_size=2, ttt=replace(ARGS.ttt, persistent_states=False))
    assert abs(without["loss"] - one["loss"]) > 1e-3


def test_evaluation_during_training_changes_neither_losses_nor_memory(demo, tmp_path):
    settings = {"max_steps": 4, "duration_sec": 2.56, "num_microbatches": 2, "eval_freq": 1}
    for name, do_eval in (("with", True), ("without", False)):
        run_training(run_args(demo, tmp_path / name, "ttt", do_eval=do_eval, **settings))
    first, second = (read_metrics(tmp_path / name, "train") for name in ("with", "without"))
    assert [record["loss"] for record in first] == [record["loss"] for record in second]
    assert [record["memory_carried"] for record in first] == [record["memory_carried"] for record in second]
    assert first[-1]["memory_carried"] > 0 and len(read_metrics(tmp_path / "with", "eval")) == 4
    found = []
    for name in ("with", "without"):
        state_dir = tmp_path / name / "checkpoints" / "checkpoint_000004" / "state"
        metadata = FileSystemReader(state_dir).read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(entry.size) for key, entry in metadata.items() if key.startswith("memory")
        }
        torch.distributed.checkpoint.load(tensors, checkpoint_id=state_dir, no_dist=True)
        found.append(tensors)
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
