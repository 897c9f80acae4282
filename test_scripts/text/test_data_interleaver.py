"""The text stream, against frames worked out by hand at 12.5 frames per second (0.08 s each)."""

import pytest

from conftest import LetterTokenizer
from finetune.data.args import TextOptions
from finetune.data.batches.interleaver import interleave_text
from finetune.data.words import Word

P, E = 3, 0  # padding, end of padding


def interleave(*words, num_frames=10, **options):
    return interleave_text(
        [Word(*word) if len(word) == 4 else Word(*word, "SPEAKER_MAIN") for word in words],
        num_frames=num_frames,
        frame_rate=12.5,
        tokenizer=LetterTokenizer(),
        text_padding_id=P,
        end_of_text_padding_id=E,
        options=TextOptions(**options),
    ).tolist()


def test_first_ten_frames_of_a_dialogue():
    frames = interleave(
        ("ab", 0.17, 0.3),  # 0.17 s * 12.5 = 2.1: frame 2
        ("zzz", 0.2, 0.6, "SPEAKER_1"),  # the user's words are not Moshi's text
        ("cdef", 0.40, 0.9),  # frame 5; frames 5 and 6, then the next word takes over
        ("g", 0.56, 0.60),  # frame 7
        ("hij", 0.73, 1.0),  # frame 9; two tokens fall off the end
    )
    assert frames == [P, E, 11, 12, E, 13, 14, 17, E, 18]


def test_word_in_the_first_frame_has_no_end_of_padding():
    assert interleave(("ab", 0.0, 0.2), num_frames=4) == [11, 12, P, P]


def test_words_that_start_in_one_frame_follow_each_other():
    assert interleave(("ab", 0.09, 0.1), ("c", 0.10, 0.15), num_frames=5) == [E, 11, 12, 13, P]
    assert interleave(("abc", 0.0, 0.1), ("d", 0.01, 0.1), ("e", 0.2, 0.3), num_frames=4) == [11, 12, 15, P]


def test_words_are_placed_by_time_whatever_their_order():
    assert interleave(("b", 0.25, 0.3), ("a", 0.09, 0.1), num_frames=5) == [E, 11, E, 12, P]


@pytest.mark.parametrize("end_sec", [0.1, 0.05])
def test_word_of_which_only_the_start_is_right_is_kept(end_sec):
    assert interleave(("a", 0.1, end_sec), num_frames=3) == [E, 11, P]


@pytest.mark.parametrize("start_sec", [-0.01, 0.24])
def test_word_that_starts_outside_the_chunk_is_left_out(start_sec):
    assert interleave(("a", start_sec, 0.5), num_frames=3) == [P, P, P]


def test_word_without_tokens_ends_the_previous_word():
    assert interleave(("abcd", 0.0, 0.2), ("", 0.17, 0.2), num_frames=4) == [11, 12, P, P]


def test_line_break_within_a_word_is_a_token():
    assert interleave((" a\nb ", 0.0, 0.2), num_frames=4) == [11, 5, 12, P]


def test_line_break_without_a_token_joins_the_lines(monkeypatch):
    encode = LetterTokenizer.encode
    monkeypatch.setattr(LetterTokenizer, "encode", lambda self, text: encode(self, text.replace("\n", "")))
    assert interleave(("a\nb", 0.0, 0.2), num_frames=4) == [11, 12, P, P]


def test_a_word_waits_for_the_one_before_with_keep_and_shift():
    words = ("abcd", 0.0, 0.2), ("ef", 0.17, 0.2), ("g", 0.72, 0.8)
    assert interleave(*words) == [11, 12, 15, 16, P, P, P, P, E, 17]
    assert interleave(*words, keep_and_shift=True) == [11, 12, 13, 14, 15, 16, P, P, E, 17]


def test_words_of_all_speakers_are_text_without_keep_main_only():
    words = ("a", 0.0, 0.1), ("b", 0.17, 0.2, "SPEAKER_00")
    assert interleave(*words, num_frames=4, keep_main_only=False) == [11, E, 12, P]
    assert interleave(*words, num_frames=4) == [11, P, P, P]


def test_no_words_are_padding_only():
    assert interleave(num_frames=3) == [P, P, P]


def test_a_word_at_the_start_of_a_frame_is_in_that_frame_however_far_into_the_recording():
    for frame in range(1, 3000):
        start_sec = round(frame * 0.08, 2)  # 4.56 * 12.5 is 56.99999999999999 in floating point
        text = interleave(("a", start_sec, start_sec + 1), num_frames=frame + 1)
        assert text[frame] == 11 and text[frame - 1] == E
