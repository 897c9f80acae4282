"""Tokens as people read them, on the terminal, in reports and from the server; and whose tokenizer it is."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import sphn
import torch

from finetune.base_model.text import TextDecoder
from finetune.data.encode import encode
from finetune.demo.tokenizer import write_tokenizer
from finetune.evaluation.command import evaluate
from finetune.export.command import export
from finetune.inference.command import generate
from finetune.inference.conversation import Conversation, Reply
from finetune.serving.command import serve
from finetune.serving.voice import MemoryFiles, Voice
from finetune.training.command import train
from run_helpers import run_values, write_yaml

TEXTS = ("hello", "你好", "café", "😀", "Größe", "10 €", "1<2", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    write_tokenizer(path, seed=0)
    return sentencepiece.SentencePieceProcessor(str(path))


@pytest.fixture
def decoder(tokenizer):
    return TextDecoder(tokenizer, padding=(3, 0))


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_shown_as_the_tokenizer_decodes_it(tokenizer, decoder, text):
    assert decoder.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_bytes_wait_for_their_character_across_padding(tokenizer, decoder):
    space, *letters = tokenizer.encode("你")
    assert [decoder.add(token) for token in (space, letters[0], 3, letters[1], 0, letters[2])] == [
        " ",
        "",
        "",
        "",
        "",
        "你",
    ]


def test_bytes_that_are_no_character_are_marked(tokenizer, decoder):
    first = tokenizer.encode("你")[1]
    (hello, *_) = tokenizer.encode("hello")
    assert decoder.add(first) == ""
    assert decoder.add(hello) == "\ufffd" + tokenizer.id_to_piece(hello).replace("▁", " ")
    assert decoder.add(first) == "" and decoder.finish() == "\ufffd"
    assert decoder.decode([first]) == "\ufffd" and decoder.decode(tokenizer.encode("hi")) == "hi"


def test_control_unknown_and_missing_pieces_print_nothing(tokenizer, decoder):
    assert [decoder.add(token) for token in (0, 1, 2, 3, -1, tokenizer.vocab_size(), 10**9)] == [""] * 7


@pytest.fixture
def spoken(monkeypatch, tiny_base):
    """Let every model say this text."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(tiny_base / "tokenizer.model"))

    def say(text):
        tokens = iter([*tokenizer.encode(text), *[3] * 1000])

        def listen(self, audio):
            self.num_frames += 1
            return Reply(torch.full((1, 9), next(tokens)), torch.zeros(1, self.mimi.frame_size))

        monkeypatch.setattr(Conversation, "listen", listen)
        monkeypatch.setattr(Conversation, "warm_up", lambda self: None)

    return say


def test_generate_prints_and_reports_characters(spoken, untrained_run, command, tmp_path):
    spoken("café 你好")
    sphn.write_wav(str(tmp_path / "user.wav"), np.zeros(24000 * 2, np.float32), 24000)
    report = tmp_path / "r.json"
    arguments = ("--checkpoint", untrained_run("lora"), tmp_path / "user.wav", tmp_path / "o.wav")
    status, output, _ = command(generate, *arguments, "--report", report)
    assert status == 0
    assert " café 你好" in output.splitlines()
    assert json.loads(report.read_text())["text"] == ["café 你好"]


def test_the_server_sends_characters_and_forgets_half_of_one(tokenizer):
    letters = tokenizer.encode("你")
    lm = SimpleNamespace(layers=[])
    voice = Voice.__new__(Voice)
    voice._speech = SimpleNamespace(text_decoder=lambda: TextDecoder(tokenizer, padding=(3, 0)))
    voice._files = MemoryFiles()
    replies = iter([*letters[:2], *letters])
    voice._conversation = SimpleNamespace(
        start=lambda: None,
        lm=lm,
        num_resets=0,
        speaks=True,
        listen=lambda audio: Reply(torch.full((1, 9), next(replies)), torch.zeros(1, 4)),
    )
    voice._recent_ms = []
    frame = np.zeros(4, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.serving.voice.ttt_layers", lambda lm: {})
        voice._begin(False)
        assert "".join(voice._answer(frame).text for _ in letters[:2]) == " "
        voice._begin(False)
        assert "".join(voice._answer(frame).text for _ in letters) == " 你"


def _tokenizer(path, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Hello hi there you and I"] * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(params=["larger", "smaller", "padding is a word"])
def wrong(request, demo, tmp_path):
    """A copy of the demo's model with a tokenizer of another model, and what is said of it."""
    folder = tmp_path / "base"
    shutil.copytree(demo.model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    if request.param == "padding is a word":
        _tokenizer(folder / "tokenizer.model", vocab_size=290, byte_fallback=True)
        pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
        (folder / "config.json").write_text(json.dumps(config | {"text_card": pieces}))
        return folder, "piece 3 is '<0x00>', which the model takes for padding"
    change = 16 if request.param == "smaller" else -16
    (folder / "config.json").write_text(json.dumps(config | {"text_card": config["text_card"] + change}))
    return folder, f"has 800 pieces, the model has {800 + change} text tokens"


def test_the_tokenizer_of_another_model_is_refused_before_anything_starts(
    wrong, demo, untrained_run, command, tmp_path
):
    base, message = wrong
    values = run_values(demo, tmp_path / "run", moshi_paths={"hf_repo_id": str(base)})
    config = write_yaml(tmp_path / "c.yaml", values)
    checkpoint = untrained_run("lora")
    sphn.write_wav(str(tmp_path / "user.wav"), np.zeros(4000, np.float32), 24000)
    model = ("--checkpoint", checkpoint, "--base", base)
    for main, *arguments in (
        (train, config),
        (encode, demo.train_jsonl, "--base", base, "--cache-dir", tmp_path / "codes"),
        (generate, *model, tmp_path / "user.wav", tmp_path / "o.wav"),
        (serve, *model, "--port", 0),
        (evaluate, "long-context", *model, "--data", demo.eval_jsonl),
        (export, "--checkpoint", checkpoint, "--base-model", base, "--out", tmp_path / "exported"),
    ):
        status, _, errors = command(main, *arguments)
        assert status == 2, main
        assert len(errors) == 1 and message in errors[0], (main, errors)
    assert not (tmp_path / "run").exists() and not (tmp_path / "codes").exists()
