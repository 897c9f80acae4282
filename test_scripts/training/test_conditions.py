"""Text conditions in the model: rows, missing texts, memory, streaming, and a task that only they decide."""

import pytest
import torch
from moshi.models.lm import LMGen

from condition_helpers import forward, make_conditioned_lm, small_config
from conftest import make_codes
from evaluation_helpers import FakeStream, open_ttt
from finetune.args import LoraArgs, TrainArgs, TTTArgs
from finetune.base_model.conditions import (
    check_conditions,
    condition_parameters,
    condition_tensors,
    describe_conditions,
    prepare_conditions,
)
from finetune.data.batches.dataset import Batch
from finetune.errors import ConfigError
from finetune.evaluation.long_context.stream_losses import stream_losses
from finetune.evaluation.spoken.likelihood import score_items
from finetune.training.carried_memory import CarriedMemory
from finetune.training.plan.fake_step import layer_kinds
from finetune.training.plan.gpu_memory import estimate_memory
from finetune.ttt_utils import classify_ttt_parameter
from finetune.wrapped_model import build_meta_model, prepare_model

CALM, ANGRY = {"mood": "calm"}, {"mood": "angry"}
METHODS = [{"mood": "sum"}, {"mood": "cross"}, {"mood": "sum", "place": "sum", "style": "cross"}]


@pytest.mark.parametrize("methods", METHODS)
@torch.no_grad()
def test_every_row_has_its_own_conditions(methods):
    lm = open_ttt(make_conditioned_lm(**methods))
    codes = make_codes(lm, 1, 12).expand(3, -1, -1)
    logits = forward(lm, codes, [CALM, ANGRY, {}])
    for row, conditions in enumerate([CALM, ANGRY, {}]):
        alone = forward(lm, codes[:1], [conditions])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (logits[a] - logits[b]).abs().max() > 0.01


@torch.no_grad()
def test_names_that_a_model_does_not_have_change_nothing():
    lm = make_conditioned_lm(mood="sum")
    codes = make_codes(lm, 1, 6)
    assert torch.equal(forward(lm, codes, [CALM | {"other": "x"}]), forward(lm, codes, [CALM]))


def test_a_model_without_conditions_takes_none(tiny_lm):
    assert prepare_conditions(tiny_lm, [CALM]) is None
    assert condition_tensors(tiny_lm, CALM, batch_size=2) is None
    assert describe_conditions(tiny_lm) == ""


@pytest.mark.parametrize("method", ["sum", "cross"])
def test_a_task_that_only_the_condition_decides_is_learned(method):
    lm = make_conditioned_lm(mood=method).train()
    codes = make_codes(lm, 1, 8).repeat(2, 1, 1)
    codes[:, 0] = torch.tensor([5, 6])[:, None]
    codes[:, 0, 0] = 7  # and no earlier word tells
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)

    def loss(rows):
        logits = forward(lm, codes, rows)[:, 1]
        return torch.nn.functional.cross_entropy(logits, codes[:, 0, 1])

    for _ in range(60):
        optimizer.zero_grad()
        loss([CALM, ANGRY]).backward()
        optimizer.step()
    assert loss([CALM, ANGRY]) < 0.1 < 1 < loss([ANGRY, CALM])


@pytest.mark.parametrize("method", ["sum", "cross"])
@torch.no_grad()
def test_what_a_conversation_computes_is_what_training_computes(method):
    lm = open_ttt(make_conditioned_lm(mood=method))
    num_frames, seen, said = 30, [], []
    user = make_codes(lm, 1, num_frames + 2)[:, 1 + lm.dep_q :]
    generator = LMGen(
        lm,
        use_sampling=False,
        condition_tensors=condition_tensors(lm, ANGRY, batch_size=1),
        on_text_logits_hook=lambda logits: seen.append(logits[:, 0, 0].clone()),
    )
    with generator.streaming(1):
        for step in range(num_frames + max(lm.delays)):
            tokens = generator.step(user[:, :, max(step - 1, 0)][:, :, None])
            said += [] if tokens is None else [tokens]
    codes = torch.cat([torch.cat(said, 2), user[:, :, :num_frames]], 1)
    streamed = torch.stack(seen, 1)[:, :num_frames]
    torch.testing.assert_close(streamed, forward(lm, codes, [ANGRY]), rtol=1e-3, atol=1e-4)
    assert (streamed - forward(lm, codes, [CALM])).abs().max() > 0.01


@pytest.mark.parametrize("methods", METHODS[:2])
@torch.no_grad()
def test_chunks_with_carried_memory_and_context_keep_the_conditions_of_their_rows(methods):
    lm = open_ttt(make_conditioned_lm(**methods))
    codes, size = make_codes(lm, 2, 24), 12
    rows, zeros = torch.arange(2), torch.zeros(2, dtype=torch.long)
    memory = CarriedMemory(lm, torch.device("cpu"), chunk_frames=size)
    with memory.carried([0, 1], Batch(codes[:, :, :size], rows, zeros, zeros)):
        first = forward(lm, codes[:, :, :size], [CALM, ANGRY])
    memory.commit()
    whole = forward(lm, codes, [CALM, ANGRY])
    torch.testing.assert_close(first, whole[:, :size], rtol=1e-3, atol=1e-4)
    batch = Batch(codes[:, :, size - 2 :], rows, zeros + size, zeros + 2)
    with memory.carried([0, 1], batch):
        second = forward(lm, batch.codes, [CALM, ANGRY])
    with memory.carried([0, 1], batch):
        swapped = forward(lm, batch.codes, [ANGRY, CALM])
    assert second.shape == (2, size + 2, lm.text_card) and (second - swapped).abs().max() > 0.01


@pytest.mark.parametrize("method", ["sum", "cross"])
@torch.no_grad()
def test_losses_along_a_recording_are_those_of_the_forward_pass(method):
    lm = open_ttt(make_conditioned_lm(mood=method))
    codes = make_codes(lm, 1, 20)
    stream = FakeStream("a", codes[0])
    losses = stream_losses(lm, stream, chunk_frames=7, conditions=CALM).text
    logits = forward(lm, codes, [CALM])[0]
    expected = torch.nn.functional.cross_entropy(logits, codes[0, 0], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    own = [
        stream_losses(lm, stream, chunk_frames=7, conditions=conditions, own_text=True).audio
        for conditions in (CALM, ANGRY)
    ]
    assert (own[0] - own[1]).abs().nan_to_num(0).max() > 0.001


@pytest.mark.parametrize("own_text", [False, True])
def test_likelihoods_depend_on_the_condition_and_not_on_the_batch(own_text):
    lm = open_ttt(make_conditioned_lm(mood="sum", style="cross"))
    items = [make_codes(lm, 1, length, seed=length)[0] for length in (5, 8, 6)]
    for codes in items:
        codes[0] = lm.ungenerated_token_id if own_text else codes[0]

    def scores(conditions, batch_size):
        found = score_items(
            lm, items, batch_size=batch_size, max_frames_per_batch=1000, conditions=conditions
        )
        return torch.stack([score.log_likelihood for score in found])

    torch.testing.assert_close(scores(CALM, 3), scores(CALM, 1), rtol=1e-3, atol=1e-3)
    assert (scores(CALM, 3) - scores(ANGRY, 3)).abs().max() > 0.01


def test_options_name_what_the_model_has():
    lm = make_conditioned_lm(mood="sum", style="cross")
    check_conditions(lm, {"mood": "calm", "style": "any text"}, source="--condition")
    with pytest.raises(ConfigError, match=r"^--condition: .* no condition 'tone', it has mood, style\.$"):
        check_conditions(lm, {"tone": "x"}, source="--condition")
    with pytest.raises(ConfigError, match=r"^--condition: mood: 'sad' is not .* knows 'calm', 'angry'\.$"):
        check_conditions(lm, {"mood": "sad"}, source="--condition")
    assert describe_conditions(lm) == "mood (sum), style (cross)"


@pytest.mark.parametrize("method", ["sum", "cross"])
@pytest.mark.parametrize("mode", ["full", "lora", "ttt"])
def test_conditioners_train_by_the_rules_of_the_rest(mode, method):
    args = TrainArgs(
        full_finetuning=mode == "full",
        lora=LoraArgs(enable=mode == "lora", rank=2),
        ttt=TTTArgs(enable=mode == "ttt", layers="1"),
        param_dtype="float32",
    )
    lm = prepare_model(make_conditioned_lm(mood=method), args)
    trained = {
        name.removeprefix("condition_provider.conditioners.mood.")
        for name, parameter in lm.named_parameters()
        if parameter.requires_grad and name.startswith("condition_provider")
    }
    adapters = {"output_proj.lora_A.weight", "output_proj.lora_B.weight"}
    weights = {"embed.weight", "output_proj.weight", "learnt_padding"}
    assert trained == {"full": weights, "lora": adapters, "ttt": set()}[mode]
    codes, norms = make_codes(lm, 2, 16), []
    for checkpointing in (False, True):
        lm.zero_grad()
        lm.transformer.checkpointing = checkpointing
        forward(lm, codes, [CALM, {}]).square().mean().backward()
        gradients = [p.grad for p in condition_parameters(lm) if p.grad is not None]
        norms.append(float(sum(gradient.norm() for gradient in gradients)))
    assert norms[0] == pytest.approx(norms[1]) and (norms[0] > 0) == (mode != "ttt")


def test_no_name_of_a_condition_makes_it_a_part_of_ttt():
    assert classify_ttt_parameter("condition_provider.conditioners.ttt.embed.weight") == "base"


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"full_finetuning": True}, {"lora": LoraArgs(enable=True, rank=4)}])
def test_the_memory_estimate_counts_conditions(mode):
    args = TrainArgs(param_dtype="float32", duration_sec=2.0, batch_size=2, **mode)
    config = small_config(mood="sum", style="cross")
    plain = estimate_memory(args, small_config(), num_gpus=1)
    estimate = estimate_memory(args, config, num_gpus=1)
    assert estimate.weights > plain.weights and estimate.peak > plain.peak
    kinds = layer_kinds(build_meta_model(args, config))
    assert kinds[0].input_grad  # through the sum into the embedding's place
