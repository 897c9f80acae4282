"""Dialogues of a container that these tests make: laid out as the Amazon Queen's, with tones for voices."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from debian_packages import encode_sound, write_package
from finetune.annotation.aligner import Alignment
from finetune.data.words import Word
from finetune.demo.human_dialogues import command
from finetune.demo.human_dialogues.amazon_queen import PACKAGE, read_amazon_queen
from finetune.demo.human_dialogues.queen_archive import Archive
from finetune.demo.human_dialogues.queen_lines import sentence_lines
from finetune.demo.human_dialogues.queen_scenes import read_scene
from finetune.demo.human_dialogues.queen_talk import read_talk
from finetune.errors import DataError, UserError

RATE = 11_025
HEADER = bytes(20)
JOE, BOB, ROCK, SUE = 0, 1, 2, 3
PERSONS = frozenset({BOB, SUE})

# The answer that leads to the level, and what Joe may say: number, level after it or -1.
LEVELS = [
    [(1, 0), (6, 1), (9, -1), (7, 1), (-1, 0)],
    [(6, 8), (30, 6), (31, 1), (32, 1), (-1, 0)],  # about 6 he asks with 8 the next time
]
SAYS = {
    0: "Hello.",
    6: "Questions?*03",
    7: "A phone?",
    8: "More questions?",
    9: "Bye.",
    30: "Who?",
    31: "Where?",
}
ANSWERS = {1: "What now?", 6: "Go on.", 7: "No.*01Sorry.", 9: "Bye bye.", 30: "Me.", 40: "Never asked."}
TALK = [
    "J Hello.",
    "P What now?",
    "J Questions?",
    "P Go on.",
    "J Who?",
    "P Me.",
    "J Where?",
    "J A phone?",
    "P No.",
    "P Sorry.",
    "J More questions?",
    "J Bye.",
    "P Bye bye.",
    "J Me again.",
    "P You again.",
]


def text(value: str, *, align: int, at: int) -> bytes:
    """A string after its length, with what fills it up; `at` is where it begins in the file."""
    data = bytes([len(value)]) + value.encode("cp437")
    return data + bytes(-(at + len(data)) % align) if value else data


def talk_file() -> bytes:
    """A `.DOG` file."""
    tree = b"".join(
        struct.pack(">8h", 0, number, 0, following, 0, 0, 0, 0)
        for level in LEVELS
        for number, following in (*level, (0, 0))
    )
    body = bytes(32) + tree
    begins = []
    for sentences in (SAYS, ANSWERS):
        begins.append(len(body))
        for number, sentence in sentences.items():
            body += struct.pack(">2h", 0, number)
            body += text(sentence, align=4, at=len(body))
    begins.append(len(body))
    for sentence in ("You again.", "Me again."):
        body += text(sentence, align=2, at=len(body))
    head = struct.pack(">5h", len(LEVELS), 5, 6, len(SAYS), len(ANSWERS)) + bytes(12)
    head += struct.pack(">3h", begins[1], 0, begins[2])
    return HEADER + head + bytes(4) + body[32:]


def scene_file(steps: list[tuple[int, str]], *, unread: int = 2) -> bytes:
    """A `.CUT` file; the rock moves, which takes frames, and says nothing."""
    body = b""
    for who, _ in steps:
        numbers = [0] * 17
        numbers[0], numbers[5] = who, 1
        body += struct.pack(">17h", *numbers) + struct.pack(">2h", 1, 99)  # one person is present
        if who == ROCK:
            body += struct.pack(">10h", ROCK, *range(9)) * 2 + struct.pack(">h", -2)
    body += bytes(unread)
    steps_end = 12 + len(body)
    strings = b""
    for sentence in ("*FL", *(sentence for _, sentence in steps)):
        strings += text(sentence, align=2, at=steps_end + len(strings))
    return HEADER + struct.pack(">6h", 0, len(steps), 0, steps_end, steps_end, 0) + body + strings


def objects_file() -> bytes:
    """`QUEEN.JAS`: three objects, of which the second is no person."""
    objects = b"".join(struct.pack(">8h", 1, 0, 0, 0, 0, 0, 0, image) for image in (-3, 5, -4))
    return HEADER + struct.pack(">4h", 1, 1, 3, 1) + objects


def container(files: dict[str, bytes], *, version: bytes = b"CEM10", compression: int = 3) -> bytes:
    data = b"".join(files.values())
    table = b"QTBL" + struct.pack(">6s2xBH", version, compression, len(files))
    offset = len(table) + 21 * len(files)
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset, len(content))
        offset += len(content)
    return table + data


def tone(sec: float = 0.9) -> bytes:
    samples = 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(sec * RATE)) / RATE)
    return encode_sound(samples, rate=RATE, file_format="flac", codec="flac")


def game() -> dict[str, bytes]:
    """Files of the container: a conversation, scenes, and the voices, two of which belong to none."""
    voices = [f"06{number:04X}J1" for number in SAYS if number] + [f"06{number:04X}P1" for number in ANSWERS]
    voices += ["06SSSSJ1", "060007P2", "06XXXXJ1", "06XXXXP1", "JOE00011"]
    voices += ["C1A__011", "C1A__031", "C1A__032", "C2___011", "C2___021", "C2___031", "BUMP0001"]
    files = {"BOB.DOG": talk_file(), "QUEEN.JAS": objects_file()}
    files["C1A.CUT"] = scene_file(
        [(JOE, "A boat!*02"), (ROCK, ""), (BOB, "Where?*XY00(237,112)There."), (BOB, "*")]
    )
    files["C2.CUT"] = scene_file([(JOE, "One."), (BOB, "Two."), (SUE, "Three.")])
    files["C3.CUT"] = scene_file([(JOE, "Odd.")], unread=0)
    return files | {f"{name}.SB": tone() for name in voices}


def write_game(folder: Path, data: bytes) -> Path:
    path = folder / f"{PACKAGE}_1_all.deb"
    doc = f"usr/share/doc/{PACKAGE}"
    notices = {
        f"{doc}/copyright": b"Give it away.\n",
        f"{doc}/readme.txt.gz": gzip.compress(b"Leave intact.\n"),
    }
    write_package(path, {f"usr/share/scummvm/{PACKAGE}/queen.1c": data} | notices)
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return write_game(tmp_path_factory.mktemp("package"), container(game()))


def said(lines) -> list[str]:
    return [f"{'J' if line.by_first else 'P'} {line.text}" for line in lines]


def test_a_conversation_asks_everything_once_and_answers_where_it_is_asked(package):
    material = read_amazon_queen([package])
    conversations = {conversation.name: conversation.lines for conversation in material.conversations}
    assert said(conversations["dog_bob"]) == TALK
    assert [line.name for line in conversations["dog_bob"]][:3] == [
        "06SSSSJ1.SB",
        "060001P1.SB",
        "060006J1.SB",
    ]


def test_a_scene_is_taken_if_joe_and_one_other_speak_in_it(package):
    material = read_amazon_queen([package])
    assert [conversation.name for conversation in material.conversations] == ["cut_c1a", "dog_bob"]
    assert said(material.conversations[0].lines) == ["J A boat!", "P Where?", "P There."]
    # three of the scene with three speakers, a monologue, an answer to what is not asked, two texts that are
    # only announced
    assert material.left_out == {"of monologues and of scenes of others": 5}
    assert material.notices == {"copyright": "Give it away.\n", "readme.txt": "Leave intact.\n"}


def test_steps_of_a_scene_are_read_whatever_moves_between():
    steps = read_scene(scene_file([(ROCK, ""), (BOB, "Hi."), (ROCK, ""), (JOE, "Ho.")])[20:], PERSONS)
    assert [(step.speaker, step.sentence) for step in steps] == [(2, ""), (1, "Hi."), (2, ""), (0, "Ho.")]
    with pytest.raises(struct.error, match="its steps do not end where it says"):
        read_scene(scene_file([(BOB, "Hi.")], unread=4)[20:], PERSONS)


def test_notes_and_gestures_are_not_words():
    archive = Archive(container({f"AAAAAAA{part}.SB": b"sound" for part in range(1, 5)}), where="x")
    lines = sentence_lines(
        archive, "AAAAAAA", "(sigh)*03A Treatment^_!*02<gulp>*XY00(237,112)Yes. *GMNo voice?*", by_first=True
    )
    assert [(line.name, line.text) for line in lines] == [
        ("AAAAAAA2.SB", "A Treatment!"),
        ("AAAAAAA4.SB", "Yes."),
    ]


class QuestionsFail:
    """Stands in the place of the aligner: a text with a question mark matches no recording."""

    def align(self, samples, text):
        if "?" in text:
            raise DataError("does not match.")
        words = [Word(word, 0.01 * place, 0.01 * place + 0.005) for place, word in enumerate(text.split())]
        return Alignment(words, 0.0, 0.0)


def test_words_are_aligned_where_the_text_matches_and_estimated_elsewhere(
    package, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "Aligner", QuestionsFail)
    arguments = ["amazon-queen", "--out", str(tmp_path / "out"), "--packages", str(package.parent)]
    assert command.human_dialogues(arguments) == 0
    printed = capsys.readouterr().out
    assert "words:      26, of which the times of 10 are estimated" in printed
    assert f"terms:      {tmp_path / 'out' / 'copyright'}, {tmp_path / 'out' / 'readme.txt'}" in printed
    (timings,) = (tmp_path / "out" / "data").glob("*/dog_bob.json")
    words = json.loads(timings.read_text())["alignments"]
    assert " ".join(word for word, _, _ in words) == " ".join(line[2:] for line in TALK)
    lengths = {word: end_sec - start_sec for word, (start_sec, end_sec), _ in words}
    assert lengths["Hello."] == pytest.approx(0.005) and lengths["Where?"] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nothing", "queen.1c: is damaged"),
        (container(game(), version=b"PEM10"), "is not the English version with compressed voices"),
        (container(game(), compression=0), "is not the English version with compressed voices"),
        (container(game())[:-5], "is damaged (29 files are announced, and the 29. is not whole)"),
        (container(game() | {"BOB.DOG": talk_file()[:300]}), "is damaged (BOB.DOG: "),
        (container({"BOB.DOG": talk_file()}), "is damaged (it holds no QUEEN.JAS)"),
        (container({"QUEEN.JAS": HEADER}), "is damaged (QUEEN.JAS: "),
        (container({"QUEEN.JAS": objects_file()}), "no dialogue is found"),
    ],
)
def test_a_container_that_cannot_be_used_is_named_in_one_line(tmp_path, data, message):
    path = write_game(tmp_path, data)
    with pytest.raises(UserError) as error:
        read_amazon_queen([path])
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_script_is_an_error_and_nothing_else():
    talk, scene = talk_file()[20:], scene_file([(ROCK, ""), (BOB, "Hi.")])[20:]
    for length in range(len(talk) - 1):
        with pytest.raises(struct.error):
            read_talk(talk[:length])
    for length in range(len(scene) - 1):
        with pytest.raises(struct.error):
            read_scene(scene[:length], PERSONS)
