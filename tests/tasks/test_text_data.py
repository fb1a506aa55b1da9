"""Sets of sentences from a directory, the hub and the bundled sample; their word pieces."""

from __future__ import annotations

import logging
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepsmith.tasks import image_hub, sources
from stepsmith.tasks import text_data as module
from stepsmith.tasks.image_files import DataError
from stepsmith.tasks.text_data import KNOWN_TEXTS, TextSet, load_text
from stepsmith.tasks.wordpiece import CLS, MASK, PAD, SEP, SPECIAL, UNK, encode, train_tokenizer

TRAIN = ["A  pub near\nthe river.", "It is cheap.", "It is cheap.", " ", None]
TEST = ["A cheap pub."]
CLEAN = ("A pub near the river.", "It is cheap.")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing cached or announced, and no network."""
    monkeypatch.setattr(sources, "_noticed", set())
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: "hub not reachable (test)")
    monkeypatch.setattr(image_hub, "_prepared_before", lambda hub_id: None)
    module._load_cached.cache_clear()


def parquet_set(folder, column="text", train=TRAIN, test=TEST, **others):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        columns = {column: pa.array(rows, pa.string())}
        columns |= {name: pa.array([value] * len(rows)) for name, value in others.items()}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


def text_files(folder, train="one\n\ntwo\none\n", test="three\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(train)
    (folder / "test.txt").write_text(test)
    return folder


def refusal(*args, **kwargs):
    """The message of the DataError that loading raises, checked to be one line."""
    with pytest.raises(DataError) as caught:
        load_text(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_sample_holds_distinct_sentences_of_both_columns():
    for name, start in (("e2e", ""), ("e2e-mr", "name[")):
        text = load_text(name, source="sample")
        assert (text.name, text.origin) == (name, "sample")
        assert (len(text.train), len(text.test)) == (4000, 500)
        assert len(set(text.train)) == 4000
        assert all(s.startswith(start) for s in text.train)
    meanings = load_text("e2e-mr", source="sample")
    assert not set(meanings.train) & set(meanings.test)


def test_the_licence_of_the_sample_is_beside_it():
    text = (module._SAMPLE_DIR / "LICENSE-E2E.txt").read_text()
    assert "CC BY-SA 4.0" in text
    for path in module._SAMPLE_DIR.glob("*.parquet"):
        assert path.name in text


def test_sentences_are_distinct_and_on_one_line_each(tmp_path):
    parquet_set(tmp_path / "mine", index=3)
    text = load_text("mine", data_dir=tmp_path)
    assert (text.train, text.test) == (CLEAN, tuple(TEST))
    assert text.origin == f"directory:{tmp_path / 'mine'}"
    assert load_text("mine", data_dir=str(tmp_path)) is text


def test_plain_text_is_a_sentence_a_line(tmp_path):
    text_files(tmp_path / "mine")
    assert load_text("mine", data_dir=tmp_path).train == ("one", "two")
    assert load_text("mine", data_dir=tmp_path / "mine").test == ("three",)


def test_both_known_sets_lie_in_one_folder(tmp_path):
    parquet_set(tmp_path / "e2e", "human_reference", meaning_representation="name[X]")
    assert load_text("e2e", data_dir=tmp_path).train == CLEAN
    assert load_text("E2E_MR", data_dir=tmp_path).train == ("name[X]",)
    assert load_text("e2e-mr", data_dir=tmp_path / "e2e").name == "e2e-mr"
    text_files(tmp_path / "plain" / "e2e")
    assert load_text("e2e", data_dir=tmp_path / "plain").train == ("one", "two")
    # Lines have no columns: they are no meaning representations.
    assert "holds no e2e-mr" in refusal("e2e-mr", data_dir=tmp_path / "plain", source="directory")


def test_the_column_is_named_or_the_only_one(tmp_path):
    folder = parquet_set(tmp_path / "mine", "remark", author="me")
    said = refusal("mine", data_dir=tmp_path)
    assert said.startswith(f"{folder / 'train.parquet'}: needs a column 'text' or 'sentence'")
    assert "['remark', 'author']" in said
    assert load_text("mine", data_dir=tmp_path, column="remark").train == CLEAN
    assert "needs a column 'index'" in refusal("mine", data_dir=tmp_path, column="index")
    parquet_set(tmp_path / "other", "remark", index=1)
    assert load_text("other", data_dir=tmp_path).train == CLEAN
    parquet_set(tmp_path / "e2e", "text")
    assert "needs a column 'human_reference'" in refusal("e2e", data_dir=tmp_path)


def test_empty_missing_and_damaged_files_are_refused(tmp_path):
    folder = text_files(tmp_path / "mine", train=" \n\n")
    assert refusal("mine", data_dir=tmp_path) == f"{folder / 'train.txt'}: holds no sentences"
    (folder / "train.txt").write_bytes(b"caf\xe9\n")
    assert "not readable as UTF-8" in refusal("mine", data_dir=tmp_path)
    (folder / "train.txt").unlink()
    assert refusal("mine", data_dir=tmp_path).startswith(f"{folder}: no train*.parquet and no tra")
    (folder / "train.parquet").write_bytes(b"PAR1")
    assert "not a readable parquet file" in refusal("mine", data_dir=tmp_path)


@pytest.mark.parametrize(
    "separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_a_line_ends_nowhere_but_at_a_line_end(tmp_path, separator):
    folder = text_files(tmp_path / "mine")
    (folder / "train.txt").write_bytes(f"a{separator}b\nc\r\nd\re{separator}".encode())
    assert load_text("mine", data_dir=tmp_path).train == ("a b", "c", "d", "e")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_are_no_text(tmp_path, codec, line_end):
    folder = text_files(tmp_path / "mine")
    lines = ("caf\xe9", "na\xefve \U0001f600", "\u0a0d")  # the last has the bytes of a line end
    (folder / "train.txt").write_bytes(line_end.join(lines).encode(codec))
    assert load_text("mine", data_dir=tmp_path).train == lines


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_byte_order_marks_may_name_the_other_order(tmp_path, codec):
    folder = text_files(tmp_path / "mine")
    (folder / "train.txt").write_bytes("\ufeffone\ntwo".encode(codec))
    assert load_text("mine", data_dir=tmp_path).train == ("one", "two")


def test_files_that_were_joined_have_marks_within(tmp_path):
    folder = text_files(tmp_path / "mine")
    (folder / "train.txt").write_bytes("one\n".encode("utf-8-sig") * 2 + b"two")
    assert load_text("mine", data_dir=tmp_path).train == ("one", "two")
    parquet_set(tmp_path / "tables", train=["\ufeffone", "one"])
    assert load_text("tables", data_dir=tmp_path).train == ("one",)


@pytest.mark.parametrize(
    "content",
    [
        "caf\xe9".encode("latin-1"), "one\ntwo".encode("utf-16-le"), b"one\0two", b"\xff\xfeo",
        "caf\xe9".encode("cp1252"), "\u65e5".encode("shift-jis"), b"\xed\xa0\x80",
    ],
)  # fmt: skip
def test_other_encodings_are_refused(tmp_path, content):
    folder = text_files(tmp_path / "mine")
    (folder / "train.txt").write_bytes(content)
    assert f"{folder / 'train.txt'}: not readable as UTF-8 text" in refusal(
        "mine", data_dir=tmp_path
    )


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n \r\n\t"])
def test_files_without_text_are_refused(tmp_path, content):
    folder = text_files(tmp_path / "mine")
    (folder / "test.txt").write_bytes(content)
    assert refusal("mine", data_dir=tmp_path) == f"{folder / 'test.txt'}: holds no sentences"


def test_strings_that_are_no_utf8_are_refused(tmp_path):
    folder = parquet_set(tmp_path / "mine")
    broken = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), folder / "train.parquet")
    assert "not readable" in refusal("mine", data_dir=tmp_path)


def test_texts_above_the_limit_are_not_read(tmp_path, monkeypatch):
    folder = text_files(tmp_path / "mine")
    with (folder / "train.txt").open("ab") as file:
        file.truncate(3 * 2**30)  # takes no room on disk
    said = refusal("mine", data_dir=tmp_path)
    assert said.startswith(f"{folder / 'train.txt'}: its text would take 3 GiB, and the limit is 2")
    text_files(folder, train="".join(f"{i:0100}\n" for i in range(100)))
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(10_100 / 2**30))
    assert len(load_text("mine", data_dir=tmp_path, cache=False).train) == 100
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(10_099 / 2**30))
    assert "its text would take" in refusal("mine", data_dir=tmp_path, cache=False)


@pytest.mark.parametrize("split", [(), ("",), (3,), ["a list"]])
def test_a_text_set_holds_sentences(split):
    with pytest.raises(ValueError, match=r"^toy: test "):
        TextSet("toy", "test", ("fine",), split)


def test_unknown_names_and_sources(tmp_path):
    text_files(tmp_path / "stories")
    assert "unknown text set 'e2f': did you mean 'e2e'?" in refusal("e2f")
    assert "did you mean 'stories'?" in refusal("storys", data_dir=tmp_path)
    with pytest.raises(ValueError, match="one of auto, directory, hub, sample, got 'web'"):
        load_text("e2e", source="web")
    assert "no bundled sample, only of e2e, e2e-mr" in refusal(
        "stories", source="sample", data_dir=tmp_path
    )


def test_auto_comes_down_to_the_sample_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="stepsmith"):
        for name in ("e2e", "e2e", "e2e-mr"):
            assert load_text(name, cache=False).origin == "sample"
    first, second = caplog.messages
    assert first.startswith("e2e: using the bundled sample, 4000 training and 500 test sentences")
    assert "hub not reachable (test)" in first
    assert second.startswith("e2e-mr: ")
    assert "hub not reachable" in refusal("me/tales")
    assert "hub not reachable" in refusal("e2e", source="hub")
    assert "pass data_dir=" in refusal("e2e", source="directory")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders of parquet files, read by the real `datasets`."""
    hf = pytest.importorskip("datasets")
    real = hf.load_dataset

    def load_dataset(hub_id, revision=None):
        files = {p.stem: str(p) for p in (tmp_path / hub_id / (revision or "")).glob("*.parquet")}
        if not files:
            raise hf.exceptions.DatasetNotFoundError(f"Dataset '{hub_id}' doesn't exist")
        return real("parquet", data_files=files, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: None)
    return tmp_path


@pytest.mark.parametrize("name", KNOWN_TEXTS)
def test_known_sets_are_read_from_their_branch_and_column_on_the_hub(hub, name):
    known = KNOWN_TEXTS[name]
    parquet_set(hub / known.hub_id / known.revision, known.column, other="not this")
    text = load_text(name)
    assert (text.origin, text.train) == (f"hub:{known.hub_id}", CLEAN)


def test_any_hub_set_with_a_column_of_strings_will_do(hub):
    parquet_set(hub / "me/tales", "sentence", author="me")
    assert load_text("me/tales").train == CLEAN
    assert load_text("me/tales", column="author").train == ("me",)
    assert "needs a column 'title'" in refusal("me/tales", column="title")
    assert "me/nothing did not load" in refusal("me/nothing")


# --- word pieces ----------------------------------------------------------------------------------


def test_two_processes_train_the_same_pieces():
    code = (
        "import json, sys; from stepsmith.tasks.text_data import load_text; "
        "from stepsmith.tasks.wordpiece import train_tokenizer; "
        "text = load_text('e2e', source='sample').train[:1500]; "
        "print(json.dumps(train_tokenizer(text, 400).get_vocab(), sort_keys=True))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert len({run.stdout for run in runs}) == 1
    assert len(runs[0].stdout) > 400


def test_pieces_are_lower_case_and_put_together_again():
    sentences = load_text("e2e", source="sample").train
    tokenizer = train_tokenizer(sentences, 500)
    assert train_tokenizer(sentences, 500) is tokenizer
    pieces = tokenizer.get_vocab()
    assert len(pieces) == 500
    assert [pieces[name] for name in SPECIAL] == list(range(len(SPECIAL)))
    got = tokenizer.encode("The Eagle is a Café").tokens
    assert "".join(got).replace("##", "") == "theeagleisacafe"
    # What stands in a text is text.
    assert MASK not in tokenizer.encode("a [MASK] b").ids


def test_encoding_frames_cuts_and_pads():
    tokenizer = train_tokenizer(("a b a b", "b a"), 64)
    a, b = (tokenizer.token_to_id(piece) for piece in "ab")
    tokens, counts = encode(("a b", "a b a b a", "\x00", "z"), tokenizer, 5)
    assert tokens.tolist() == [[CLS, a, b, SEP, PAD], [CLS, a, b, a, SEP], [CLS, UNK, SEP, 0, 0]]
    assert counts.tolist() == [2, 3, 1]
    with pytest.raises(DataError, match="no sentence holds a piece"):
        encode(("\x00",), tokenizer, 5)
    with pytest.raises(ValueError, match="length must be at least 3"):
        encode(("a",), tokenizer, 2)
    with pytest.raises(ValueError, match="vocabulary must be at least 64"):
        train_tokenizer(("a",), 10)


def test_a_large_alphabet_leaves_room_for_words():
    letters = [chr(0x391 + i) for i in range(200) if chr(0x391 + i).isalpha()]
    sentences = (*letters, "the pub " * 50)
    pieces = train_tokenizer(sentences, 100).get_vocab()
    assert len(pieces) <= 100
    assert {"the", "pub"} <= set(pieces)
