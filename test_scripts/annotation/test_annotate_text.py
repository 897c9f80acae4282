"""From written English to what is said: numbers, symbols, unknown words, and which reading was heard."""

import re

import numpy as np
import pytest

from finetune.annotation.letter_to_sound import guess_phones
from finetune.annotation.numbers import readings_of_digits
from finetune.annotation.sentence_graph import SentenceGraph
from finetune.annotation.silence import without_long_silences
from finetune.annotation.spoken_form import spoken_parts
from finetune.errors import DataError

VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
STOPS = {"B", "CH", "D", "G", "JH", "K", "P", "T"}
PHONES = VOWELS | STOPS | {*"FLMNRSVWYZ", "DH", "HH", "NG", "SH", "TH", "ZH"}


def readings(word: str) -> list[str]:
    """All readings of a word that is one part."""
    (part,) = spoken_parts(word)
    return [" ".join(reading) for reading in part]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("0", ["zero", "oh"]),
        ("7", ["seven"]),
        ("42", ["forty two", "four two"]),
        ("105", ["one hundred five", "one hundred and five", "one oh five", "one zero five"]),
        ("1984", ["one thousand nine hundred eighty four", "nineteen eighty four", "one nine eight four"]),
        ("1900", ["nineteen hundred"]),
        ("2000", ["two thousand"]),
        ("2012", ["two thousand and twelve", "twenty twelve"]),
        ("007", ["zero zero seven", "oh oh seven"]),
        ("1,250", ["one thousand two hundred fifty", "one thousand two hundred and fifty"]),
        ("3.05", ["three point zero five", "three point oh five"]),
        ("23rd,", ["twenty third"]),
        ("12th", ["twelfth"]),
        ("20th", ["twentieth"]),
        ("1990s", ["nineteen nineties"]),
        ("7:30", ["seven thirty"]),
        ("7:05", ["seven oh five"]),
        ("12:00", ["twelve o'clock"]),
        ("$1", ["one dollar"]),
        ("£2.50", ["two pounds fifty", "two pounds and fifty pence", "two fifty"]),
        ("#", ["pound", "hash", "number"]),
        ("PBX", ["pbx", "p b x"]),
    ],
)
def test_usual_readings_are_among_those_tried(word, said):
    assert set(said) <= set(readings(word))


@pytest.mark.parametrize("digits", ["0", "10", "19", "100", "999", "1000", "54321", "1234567890", "9" * 40])
def test_every_number_has_readings_without_repetition(digits):
    found = [tuple(reading) for reading in readings_of_digits(digits)]
    assert found and len(found) == len(set(found))
    assert all(re.fullmatch("[a-z]+", word) for reading in found for word in reading)


@pytest.mark.parametrize("form", ["{}", "{}th", "${}", "{}.5", "{}s", "{},000"])
def test_absurdly_long_numbers_are_read_digit_by_digit(form):
    word = form.format("7" * 5000)
    assert all(
        set(reading) <= {"seven", "five", "zero", "oh"} for part in spoken_parts(word) for reading in part
    )


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ('"Hello!"', ["hello"]),
        ("don’t", ["don't"]),
        ("café", ["cafe"]),
        ("twenty-first", ["twenty", "first"]),
        ("and/or", ["and", "or"]),
        ("5%.", ["five", "percent"]),
        ("G722", ["g", "seven hundred twenty two"]),
        ("a.m.", ["a", "m"]),
        ("—", []),
        ("...", []),
    ],
)
def test_words_fall_into_what_is_said(word, parts):
    assert [" ".join(part[0]) for part in spoken_parts(word)] == parts


@pytest.mark.parametrize("word", ["привет", "東京", "[laughs]", "<unk>", "☺", "x²y∂", "٣٤"])
def test_what_is_not_english_is_refused_with_its_name(word):
    with pytest.raises(DataError, match=re.escape(repr(word))):
        spoken_parts(word)


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("blick", "B L IH K"),
        ("zake", "Z EY K"),
        ("thrish", "TH R IH SH"),
        ("phoxtion", "F AA K S SH AH N"),
        ("cibber", "S IH B ER"),
        ("knoop", "N UW P"),
        ("moshi", "M AA SH IY"),
    ],
)
def test_unknown_words_are_pronounced_by_rules(word, phones):
    assert " ".join(guess_phones(word)) == phones


def test_every_row_of_letters_has_a_pronunciation():
    rng = np.random.default_rng(0)
    for length in range(1, 12):
        for _ in range(50):
            word = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz'"), length))
            phones = guess_phones(word)
            assert phones and set(phones) <= PHONES, word


def test_each_token_is_traced_to_its_written_word():
    graph = SentenceGraph([spoken_parts(word) for word in "Room 105 — at 7:00".split()])  # noqa: SIM905
    said = "room one oh five at seven o'clock".split()  # noqa: SIM905
    assert graph.words_of(said) == [0, 1, 1, 1, 3, 4, 4]
    assert graph.words_of("room one hundred and five at seven".split()) == [0, 1, 1, 1, 1, 3, 4]  # noqa: SIM905


@pytest.mark.parametrize("said", ["", "room", "room one oh five at", "room one oh at seven", "one"])
def test_what_is_no_complete_reading_is_not_traced(said):
    graph = SentenceGraph([spoken_parts(word) for word in "Room 105 at 7:00".split()])  # noqa: SIM905
    assert graph.words_of(said.split()) is None


@pytest.mark.parametrize("pauses", [(), (5.0,), (0.2, 3.0, 40.0)])
def test_places_of_sound_are_found_again_in_the_recording(pauses):
    sample_rate = 1000
    rng = np.random.default_rng(0)
    pieces, onsets = [np.zeros(2 * sample_rate)], []
    for pause in (*pauses, 1.0):
        onsets.append(sum(map(len, pieces)))
        pieces += [rng.uniform(0.1, 1.0, sample_rate), np.zeros(round(pause * sample_rate))]
    samples = np.concatenate(pieces)
    sound = without_long_silences(samples, sample_rate=sample_rate)
    assert len(sound.samples) <= len(pauses) * 1.5 * sample_rate + 1.5 * sample_rate
    for place in range(0, len(sound.samples), 7):
        assert samples[int(sound.original(place))] == sound.samples[place]
    found = {int(sound.original(place)) for place in range(len(sound.samples))}
    assert found >= {place for onset in onsets for place in range(onset, onset + sample_rate)}


def test_a_short_or_even_recording_stays_whole():
    for samples in (np.ones(5), np.full(10_000, 0.5), np.zeros(10_000)):
        sound = without_long_silences(samples, sample_rate=1000)
        assert np.array_equal(sound.samples, samples)
