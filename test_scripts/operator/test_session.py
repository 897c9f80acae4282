"""A conversation that is saved and taken up again equals one that never stopped."""

import json
import math

import pytest
import torch
from moshi.models.lm import LMGen
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import load_speech_model
from moshi_ttt import load_session, save_session
from moshi_ttt.errors import StateError
from moshi_ttt.hybrid_model import set_ttt_mode

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def speech(untrained_run):
    return load_speech_model(str(untrained_run("lora_ttt")), **CPU)


@pytest.fixture(autouse=True)
def memory_is_on(speech):
    yield
    set_ttt_mode(speech.lm, "on")


def user_frames(num_frames, batch_size=1):
    generator = torch.Generator().manual_seed(5)
    return 0.1 * torch.randn(num_frames, batch_size, 1920, generator=generator)


def listen(conversation, frames):
    replies = [conversation.listen(frame) for frame in frames]
    return torch.stack([reply.tokens for reply in replies], 2), torch.cat([r.audio for r in replies], 1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_going_on_from_a_session_equals_never_having_stopped(speech, tmp_path, batch_size):
    frames, path = user_frames(60, batch_size), tmp_path / "session.safetensors"
    # Beyond the attention window of the TTT layers (25), with draws, in the middle of a mini-batch.
    with Conversation(speech.lm, speech.mimi, batch_size=batch_size) as conversation:
        conversation.start(seed=1)
        listen(conversation, frames[:37])
        save_session(conversation.generator, conversation.mimi, path)
        tokens, audio = listen(conversation, frames[37:])
    with Conversation(speech.lm, speech.mimi, batch_size=batch_size) as conversation:
        conversation.start(seed=2)
        listen(conversation, frames[10:15])
        load_session(conversation.generator, conversation.mimi, path)
        resumed_tokens, resumed_audio = listen(conversation, frames[37:])
    assert torch.equal(tokens, resumed_tokens)
    assert torch.equal(audio, resumed_audio)


@pytest.fixture
def saved(speech, tmp_path):
    path = tmp_path / "session.safetensors"
    with Conversation(speech.lm, speech.mimi) as conversation:
        listen(conversation, user_frames(5))
        save_session(conversation.generator, conversation.mimi, path)
    return path


def assert_refused(speech, path, message, *, batch_size=1):
    with Conversation(speech.lm, speech.mimi, batch_size=batch_size) as conversation:
        conversation.start(seed=0)
        random = torch.get_rng_state()
        with pytest.raises(StateError, match=message) as error:
            load_session(conversation.generator, conversation.mimi, path)
        assert "\n" not in str(error.value)
        assert conversation.generator._streaming_state.offsets.tolist() == [1] * batch_size
        assert torch.equal(torch.get_rng_state(), random)


def test_a_session_of_another_batch_size_mode_or_dtype_is_refused(speech, untrained_run, saved):
    assert_refused(speech, saved, "batch size is 1, here it is 2", batch_size=2)
    half = load_speech_model(str(untrained_run("lora_ttt")), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert_refused(half, saved, "dtype is float32, here it is bfloat16")
    set_ttt_mode(speech.lm, "frozen")
    assert_refused(speech, saved, "TTT mode is on, here it is frozen")


def test_a_session_of_another_model_is_refused(untrained_run, saved):
    other = load_speech_model(str(untrained_run("full_ttt")), **CPU)
    assert_refused(other, saved, "fingerprint of the model is [0-9a-f]{16}, here it is")


def _rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def spoil(tensors, prefix, suffix):
    name = next(name for name in tensors if name.startswith(prefix) and name.endswith(suffix))
    tensors[name].view(-1)[-1] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: spoil(t, "model.", "cache"), "cache holds values that are not finite"),
        (lambda t: spoil(t, "model.", "weights.0"), "weights.0 holds values that are not finite"),
        (lambda t: spoil(t, "codec.", "previous"), "previous holds values that are not finite"),
        (lambda t: t.pop("generator.offsets"), "has no tensor generator.offsets"),
        (lambda t: t["generator.cache"].fill_(10_000), "generator.cache holds tokens that"),
        (lambda t: t["generator.cache"].fill_(-3), "generator.cache holds tokens that"),
        (lambda t: t["model.transformer.layers.1.ttt.offsets"].fill_(16), "ttt.offsets is out of range"),
        (lambda t: t["model.transformer.offsets"].fill_(-5), "model.transformer.offsets is negative"),
        (lambda t: t["generator.offsets"].fill_(2**62), "generator.offsets is negative or too large"),
        (lambda t: t["generator.exec_mask"].fill_(False), "generator.exec_mask is not set"),
        (lambda t: t["generator.cache"].fill_(-1), "generator.cache holds tokens that"),
        (lambda t: t["random.cpu"].zero_(), "random.cpu is not the state of a random generator"),
        (lambda t: t.update({"generator.offsets": torch.zeros(1)}), "offsets has dtype torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "change",
)  # fmt: skip
def test_a_session_with_wrong_tensors_is_refused(speech, saved, change, message):
    _rewrite(saved, change)
    assert_refused(speech, saved, message)


def test_a_corrupt_or_foreign_session_is_refused(speech, saved, tmp_path):
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    assert_refused(speech, saved, "cannot be read as safetensors")
    identity = {"kind": "moshi-ttt memory 1", "identity": json.dumps({})}
    save_file({"a": torch.zeros(1)}, saved, identity)
    assert_refused(speech, saved, "is moshi-ttt memory 1, not moshi-ttt session 1")


def test_a_session_exists_inside_streaming_only(speech, tmp_path):
    with pytest.raises(ValueError, match="generator is not streaming"):
        save_session(LMGen(speech.lm), speech.mimi, tmp_path / "a.safetensors")


def test_a_conversation_answers_the_frame_it_hears(speech):
    """The user's frame t reaches the model where training put it: one step before its frame t + 1."""
    frames = user_frames(12)
    with Conversation(speech.lm, speech.mimi, sampling=Sampling(greedy=True)) as conversation:
        tokens, _ = listen(conversation, frames)
    with torch.no_grad(), speech.mimi.streaming(1):
        user = torch.cat([speech.mimi.encode(frame[:, None]) for frame in frames], 2)
    with torch.no_grad():
        codes = torch.cat([tokens, user], 1)
        output = speech.lm(codes)
    # Greedy tokens are the most likely ones of one pass over the same conversation, as in training.
    assert torch.equal(output.text_logits[0, 0].argmax(-1), tokens[0, 0])
    audio = output.logits[0].argmax(-1)
    mask = output.mask[0]
    assert mask.sum() >= mask.numel() - speech.lm.dep_q
    assert torch.equal(audio[mask], tokens[0, 1:][mask])
