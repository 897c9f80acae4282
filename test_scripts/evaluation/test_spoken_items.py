"""Spoken benchmarks as files: what is paired and what is refused."""

import itertools

import pytest

from finetune.errors import DataError
from finetune.evaluation.spoken.storycloze import load_storycloze
from finetune.evaluation.spoken.zerospeech import load_zerospeech

FRAME = 1920


LEXICAL = "filename,id,voice,frequency,word,phones,length,correct"


SYNTACTIC = "id,filename,voice,type,subtype,transcription,correct"


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.wav").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.wav").touch()


def write_gold(folder, header, rows, *, present=None, **options):
    names = [row.split(",")[header.split(",").index("filename")] for row in rows]
    touch(folder, *(names if present is None else present))
    text = "".join(f"{line}\n" for line in [header, *rows])
    (folder / "gold.csv").write_text(text, **options)


def names_of(benchmark):
    return [(pair.id, pair.voice, pair.correct.name, pair.incorrect.name) for pair in benchmark.pairs]


WORDS = [
    "aa,1,A,12,brick,B R IH K,4,1",
    "ab,1,A,12,blick,B L IH K,4,0",
    "ba,1,B,12,brick,B R IH K,4,1",
    "bb,1,B,12,blick,B L IH K,4,0",
    "cb,2,A,0,tarf,T AA R F,4,0",
    "ca,2,A,0,wharf,W AO R F,4,1",
]


@pytest.mark.parametrize("inside", ["", "lexical", "lexical/dev"])
def test_swuggy_pairs_words_of_one_id_and_voice(tmp_path, inside):
    write_gold(tmp_path / "lexical" / "dev", LEXICAL, WORDS)
    touch(tmp_path / "lexical" / "dev", "unknown")
    benchmark = load_zerospeech(tmp_path / inside, "swuggy")
    assert benchmark.name == "swuggy" and not benchmark.failures
    assert names_of(benchmark) == [("1", "A", "aa", "ab"), ("1", "B", "ba", "bb"), ("2", "A", "ca", "cb")]
    assert [pair.subtype for pair in benchmark.pairs] == ["6-20", "6-20", "oov"]
    assert [item.path for item in benchmark.items()][:2] == [
        tmp_path / "lexical" / "dev" / "aa.wav",
        tmp_path / "lexical" / "dev" / "ab.wav",
    ]


def test_sblimp_ids_count_within_a_subtype(tmp_path):
    rows = [
        "0,s1,x,agreement,regular,he runs,1",
        "0,s2,x,agreement,regular,he run,0",
        "0,s3,x,binding,principle_A,she hurt herself,1",
        "0,s4,x,binding,principle_A,she hurt himself,0",
    ]
    write_gold(tmp_path / "syntactic" / "test", SYNTACTIC, rows)
    benchmark = load_zerospeech(tmp_path, "sblimp", split="test")
    assert [pair.id for pair in benchmark.pairs] == ["agreement/regular/0", "binding/principle_A/0"]
    assert [pair.subtype for pair in benchmark.pairs] == ["agreement/regular", "binding/principle_A"]
    assert [(pair.correct.name, pair.incorrect.name) for pair in benchmark.pairs] == [
        ("s1", "s2"),
        ("s3", "s4"),
    ]


@pytest.mark.parametrize(
    ("frequency", "band"),
    [
        *(("0", "oov"), ("1", "1-5"), ("4", "1-5"), ("5", "6-20"), ("20", "21-100"), ("99.0", "21-100")),
        *(("100", ">100"), ("1e6", ">100"), ("", ""), ("-", ""), ("nan", ""), ("-1", "")),
    ],
)
def test_frequency_bands_are_the_official_ones(tmp_path, frequency, band):
    rows = [f"aa,1,A,{frequency},w,W,1,1", "ab,1,A,,v,V,1,0"]
    write_gold(tmp_path / "lexical" / "dev", LEXICAL, rows)
    assert load_zerospeech(tmp_path, "swuggy").pairs[0].subtype == band


def test_a_file_is_not_taken_for_another_of_nearly_its_name(tmp_path):
    write_gold(
        tmp_path / "lexical" / "dev",
        LEXICAL,
        ["a,1,A,1,w,W,1,1", "b,1,A,1,w,W,1,0", "B,1,B,1,w,W,1,0", "c,1,B,1,w,W,1,1"],
        present=["a", "b", "c"],
    )
    paths = {item.name: item.path for item in load_zerospeech(tmp_path, "swuggy").items()}
    assert paths["b"].exists() and not paths["B"].exists()


def test_columns_are_read_by_name_whatever_else_the_file_is_like(tmp_path):
    header = "Correct, extra ,ID,frequency,filename,voice"
    rows = ['True,"a, b",1,7,x.wav,A', "FALSE,,1,7,y,A", "1,,2,7,z,", "0.0,,2,7,w,"]
    folder = tmp_path / "lexical" / "dev"
    touch(folder, "x", "y", "z", "w")
    text = "\r\n".join([header, *rows, ""])
    (folder / "gold.csv").write_bytes(text.encode("utf-8-sig"))
    assert names_of(load_zerospeech(tmp_path, "swuggy")) == [("1", "A", "x", "y"), ("2", "", "z", "w")]


def test_rows_of_one_id_and_voice_are_paired_in_order_or_with_the_only_one(tmp_path):
    rows = [
        "c1,1,A,1,w,W,1,1",
        "c2,1,A,1,w,W,1,1",
        "n1,1,A,1,w,W,1,0",
        "n2,1,A,1,w,W,1,0",
        "d1,2,A,1,w,W,1,1",
        "m1,2,A,1,w,W,1,0",
        "m2,2,A,1,w,W,1,0",
    ]
    write_gold(tmp_path / "lexical" / "dev", LEXICAL, rows)
    pairs = [
        (correct, incorrect) for _, _, correct, incorrect in names_of(load_zerospeech(tmp_path, "swuggy"))
    ]
    assert pairs == [("c1", "n1"), ("c2", "n2"), ("d1", "m1"), ("d1", "m2")]


def test_rows_without_counterpart_are_failures_and_those_without_file_are_not_yet(tmp_path):
    rows = [*WORDS[:2], "gone,3,A,1,w,W,1,1", "there,3,A,1,v,V,1,0", "single,4,A,1,w,W,1,1"]
    folder = tmp_path / "lexical" / "dev"
    write_gold(folder, LEXICAL, rows, present=["aa", "ab", "there", "single"])
    benchmark = load_zerospeech(tmp_path, "swuggy")
    assert names_of(benchmark) == [("1", "A", "aa", "ab"), ("3", "A", "gone", "there")]
    assert benchmark.failures == {
        "single": "has no counterpart: id 4, voice 'A' has 1 correct and 0 incorrect rows"
    }
    assert benchmark.ids == {"1", "3", "4"}


def test_files_are_found_whatever_their_case_and_unicode_form_and_in_folders(tmp_path):
    composed, decomposed = "\u00e9t\u00e9", "e\u0301te\u0301"
    rows = [
        f"{composed},1,A,1,w,W,1,1",
        f"n{decomposed},1,A,1,w,W,1,0",
        *(
            f"{name},2,{index},1,w,W,1,{index % 2}"
            for index, name in enumerate(("sub/Upper", "lower", "a", "A"))
        ),
    ]
    rows = [row.replace(",2,1,", ",2,0,").replace(",2,3,", ",2,2,") for row in rows]
    folder = tmp_path / "lexical" / "dev"
    present = [decomposed, f"n{composed}", "sub/upper", "a", "A", ".codes/lower"]
    write_gold(folder, LEXICAL, rows, present=present, encoding="utf-8")
    (folder / "lower.WAV").touch()
    (folder / "again").symlink_to(folder)
    benchmark = load_zerospeech(tmp_path, "swuggy")
    paths = {item.name: item.path.relative_to(folder).as_posix() for item in benchmark.items()}
    assert paths == {
        composed: f"{decomposed}.wav",
        f"n{decomposed}": f"n{composed}.wav",
        "sub/Upper": "sub/upper.wav",
        "lower": "lower.WAV",
        "a": "a.wav",
        "A": "A.wav",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (f"{LEXICAL}\n".encode(), "has no rows"),
        (b"filename,id\nx,1\n", "has no column voice, correct; its columns are filename, id"),
        (f"{LEXICAL}\nx,1,A,1,w,W,1,maybe\n".encode(), "line 2: \"correct\" is 'maybe'; it is 1 or 0"),
        (f"{LEXICAL}\nx,1,A\n".encode(), "line 2: has more or fewer fields"),
        (f"{LEXICAL}\nx,1,A,1,w,W,1,1,1\n".encode(), "line 2: has more or fewer fields"),
        (f"{LEXICAL}\n,1,A,1,w,W,1,1\n".encode(), "line 2: has no filename"),
        (f"{LEXICAL}\nx,1,A,1,w,W,1,1\nx,1,A,1,w,W,1,0\n".encode(), "line 3: x is in line 2 already"),
        (f"{LEXICAL},voice\n".encode(), "several columns called voice"),
        (f"{LEXICAL}\n\xff\n".encode("latin-1"), "no csv file in UTF-8"),
        (f"{SYNTACTIC}\n".encode(), "is the gold of sblimp, not of swuggy"),
        (f"{LEXICAL}\ny,1,A,1,w,W,1,1\nx,1,A,1,w,W,1,0\n".encode(), "1 rows failed: y: "),
        (
            f"{LEXICAL}\nx,1,A,1,w,W,1,1\n".encode(),
            "no pair can be used, 1 rows failed: x: has no counterpart",
        ),
    ],
)
def test_gold_that_cannot_be_used_is_one_clear_line(tmp_path, content, message):
    touch(tmp_path / "lexical" / "dev", "x")
    (tmp_path / "lexical" / "dev" / "gold.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"gold\.csv") as raised:
        load_zerospeech(tmp_path, "swuggy")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("id,filename,voice,correct", "0,s1,x,1", r"has no column type, subtype; its columns are id, "),
        ("id,filename,voice,type,correct", "0,s1,x,agreement,1", r"has no column subtype; its columns"),
        (SYNTACTIC, "0,s1,x,agreement,,he runs,1", r"line 2: has no subtype\."),
        (LEXICAL, WORDS[0], "is the gold of swuggy, not of sblimp"),
    ],
)
def test_sblimp_without_subtypes_is_refused(tmp_path, header, row, message):
    write_gold(tmp_path / "syntactic" / "dev", header, [row])
    with pytest.raises(DataError, match=rf"gold\.csv: {message}"):
        load_zerospeech(tmp_path, "sblimp")


def test_folders_that_are_not_the_data_set_are_refused(tmp_path):
    write_gold(tmp_path / "lexical" / "dev", LEXICAL, WORDS)
    touch(tmp_path / "lexical" / "test", "x")
    with pytest.raises(DataError, match="does not exist"):
        load_zerospeech(tmp_path / "nowhere", "swuggy")
    with pytest.raises(DataError, match=r"test: has no gold\.csv.*use the dev split"):
        load_zerospeech(tmp_path, "swuggy", split="test")
    with pytest.raises(DataError, match="is not the test split"):
        load_zerospeech(tmp_path / "lexical" / "dev", "swuggy", split="test")
    with pytest.raises(DataError, match=r"holds no syntactic/dev/gold\.csv"):
        load_zerospeech(tmp_path, "sblimp")
    with pytest.raises(DataError, match="is not sblimp, whose folder is called syntactic"):
        load_zerospeech(tmp_path / "lexical", "sblimp")


STORIES = {
    "the release": ["0_7_correct", "1_7_incorrect", "2_9_correct", "3_9_incorrect"],
    "one number per pair": ["0_ann_correct", "0_bob_incorrect", "1_bob_correct", "1_ann_incorrect"],
    "one name per pair": ["7_correct", "7_incorrect", "9-Correct", "9-Incorrect"],
    "folders": ["7/correct", "7/incorrect", "9/a_correct", "9/a_incorrect"],
    "consecutive": ["0_x", "1_y", "2_x", "3_y"],
    "consecutive from 1": ["9_x", "10", "1_x", "2-y", "3", "4", "5", "6", "7", "8"],
}


@pytest.mark.parametrize("layout", STORIES)
def test_stories_are_paired_in_every_known_layout(tmp_path, layout):
    touch(tmp_path, *STORIES[layout], *(["0_mutual"] if "correct" in STORIES[layout][0] else []))
    benchmark = load_storycloze(tmp_path, "tstory")
    assert benchmark.name == "tstory" and not benchmark.failures
    if layout == "consecutive from 1":
        expected = [("1_x", "2-y"), ("3", "4"), ("5", "6"), ("7", "8"), ("9_x", "10")]
    else:
        expected = [tuple(STORIES[layout][:2]), tuple(STORIES[layout][2:])]
    assert [(pair.correct.name, pair.incorrect.name) for pair in benchmark.pairs] == expected
    assert len({pair.id for pair in benchmark.pairs}) == len(expected)
    assert all(item.path.is_file() for item in benchmark.items())


def test_stories_without_counterpart_are_failures_by_name(tmp_path):
    touch(tmp_path, "0_7_correct", "1_7_incorrect", "2_9_correct", "4_11_incorrect", "readme")
    benchmark = load_storycloze(tmp_path, "sstory")
    assert [pair.id for pair in benchmark.pairs] == ["7"]
    assert set(benchmark.failures) == {"2_9_correct", "4_11_incorrect", "readme"}
    assert "neither with correct nor with incorrect" in benchmark.failures["readme"]
    numbered = tmp_path / "numbered"
    touch(numbered, "0_a", "1_b", "2_c", "5_d", "name")
    benchmark = load_storycloze(numbered, "sstory")
    assert [pair.correct.name for pair in benchmark.pairs] == ["0_a"]
    assert set(benchmark.failures) == {"2_c", "5_d", "name"}


ROUND = ["0_A_correct", "0_B_incorrect", "1_B_correct", "1_C_incorrect", "2_C_correct", "2_A_incorrect"]


def test_stories_never_pair_otherwise_because_files_are_missing(tmp_path):
    """Every number, and also every letter, has one correct and one incorrect file."""
    touch(tmp_path, *ROUND)
    whole = {(pair.correct.name, pair.incorrect.name) for pair in load_storycloze(tmp_path, "tstory").pairs}
    assert whole == set(zip(ROUND[::2], ROUND[1::2], strict=True))
    refused = 0
    for missing in itertools.combinations(ROUND, 2):
        folder = tmp_path / "-".join(missing)
        touch(folder, *(name for name in ROUND if name not in missing))
        try:
            benchmark = load_storycloze(folder, "tstory")
        except DataError as error:
            assert "names pair in more than one way, " in str(error) and str(folder) in str(error)
            refused += 1
        else:
            assert {(pair.correct.name, pair.incorrect.name) for pair in benchmark.pairs} <= whole
    assert refused > 0
    with pytest.raises(DataError, match="1_B_correct with 1_C_incorrect by the number in front and 1_B_cor"):
        load_storycloze(tmp_path / "0_A_correct-2_A_incorrect", "tstory")


def test_stories_of_the_release_with_missing_files_are_paired_by_story(tmp_path):
    touch(tmp_path, "0_7_correct", "3_9_incorrect", "4_11_correct", "5_11_incorrect", "7_12_incorrect")
    benchmark = load_storycloze(tmp_path, "tstory")
    assert names_of(benchmark) == [("11", "", "4_11_correct", "5_11_incorrect")]
    assert benchmark.failures.keys() == {"0_7_correct", "3_9_incorrect", "7_12_incorrect"}


def test_of_stories_with_splits_one_is_read(tmp_path):
    touch(tmp_path / "sSC" / "dev", "0_7_correct", "1_7_incorrect")
    touch(tmp_path / "sSC" / "test", "0_8_correct", "1_8_incorrect")
    for split, id_ in (("dev", "7"), ("test", "8")):
        assert [pair.id for pair in load_storycloze(tmp_path / "sSC", "sstory", split=split).pairs] == [id_]
    touch(tmp_path / "tSC" / "test", "0_8_correct", "1_8_incorrect")
    with pytest.raises(DataError, match="tSC: has a folder test and none called dev; choose that split"):
        load_storycloze(tmp_path / "tSC", "tstory")


def test_numbers_far_apart_take_no_time(tmp_path):
    touch(tmp_path, "0", "1", "3", "20240101120001")
    benchmark = load_storycloze(tmp_path, "tstory")
    assert [pair.correct.name for pair in benchmark.pairs] == ["0"]
    assert benchmark.failures.keys() == {"3", "20240101120001"}


@pytest.mark.parametrize("missing", ["0_a", "5_f"])
def test_numbers_that_may_have_lost_their_first_file_are_refused(tmp_path, missing):
    names = ["0_a", "1_b", "2_c", "3_d", "4_e", "5_f"]
    touch(tmp_path, *(name for name in names if name != missing))
    with pytest.raises(DataError, match=rf"{tmp_path.name}: files .*not known which ones are correct"):
        load_storycloze(tmp_path, "sstory")


def test_folders_without_stories_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_storycloze(tmp_path / "nowhere", "tstory")
    with pytest.raises(DataError, match=r"^no audio file"):
        load_storycloze(tmp_path, "tstory")
    touch(tmp_path, "a", "b")
    with pytest.raises(DataError, match="holds no pair"):
        load_storycloze(tmp_path, "tstory")
