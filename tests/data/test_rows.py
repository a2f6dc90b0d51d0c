"""One line of a data file: what is a row, and what is said about a line that is none."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.data import rows
from wmtp_ds.data.rows import Row, parse_row, read_lines
from wmtp_ds.errors import UserError

GOOD = {"problem_id": "p", "instruction": "Add.", "output": "a + b", "is_correct": True}


def parse(found: object) -> Row:
    return parse_row(json.dumps(found).encode(), "train.jsonl", 7)


def complaint(line: bytes) -> str:
    with pytest.raises(UserError) as caught:
        parse_row(line, "train.jsonl", 7)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_fewest_keys():
    assert parse(GOOD) == Row("p", "Add.", "a + b", True, input="", difficulty=0, metadata={})


def test_all_keys():
    found = GOOD | {"input": "1 2", "difficulty": 11, "metadata": {"source": {"n": [1, None]}}, "is_correct": False}
    assert parse(found) == Row("p", "Add.", "a + b", False, "1 2", 11, {"source": {"n": [1, None]}})


def test_null_means_absent_for_optional_keys():
    assert parse(GOOD | {"input": None, "difficulty": None, "metadata": None}) == parse(GOOD)


@given(
    st.fixed_dictionaries(
        {
            "problem_id": st.text(min_size=1).filter(str.strip),
            "instruction": st.text(),
            "output": st.text(min_size=1).filter(str.strip),
            "is_correct": st.booleans(),
        },
        optional={"input": st.text(), "difficulty": st.integers(1, 2**31 - 1)},
    ),
    st.booleans(),
    st.sampled_from([b"", b"\n", b"\r\n", b"  \n\n"]),
)
def test_a_row_survives_the_file(found, ascii_only, line_end):
    row = parse_row(json.dumps(found, ensure_ascii=ascii_only).encode() + line_end, "f", 1)
    assert {key: getattr(row, key) for key in found} == found


def without(key: str) -> dict[str, object]:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (without("problem_id"), '"problem_id" is missing'),
        (without("instruction"), '"instruction" is missing'),
        (without("output"), '"output" is missing'),
        (without("is_correct"), '"is_correct" is missing'),
        (GOOD | {"output": None}, '"output" is missing'),
        (GOOD | {"problem_id": 12}, '"problem_id" must be a text, not 12: write "12", in quotes'),
        (GOOD | {"instruction": ["a"]}, '"instruction" must be a text, not ["a"]'),
        (GOOD | {"input": 1.5}, '"input" must be a text, not 1.5'),
        (GOOD | {"output": {"code": "x" * 99}}, '"output" must be a text, not {"code": "xxxxx'),
        (GOOD | {"output": " \n"}, '"output" is empty'),
        (GOOD | {"problem_id": ""}, '"problem_id" is empty'),
        (GOOD | {"is_correct": 1}, '"is_correct" must be true or false, not 1:'),
        (GOOD | {"is_correct": "true"}, '"is_correct" must be true or false, not "true":'),
        (GOOD | {"difficulty": 0}, '"difficulty" must be a whole number of at least 1, not 0'),
        (GOOD | {"difficulty": -1}, "of at least 1, not -1"),
        (GOOD | {"difficulty": 2.0}, "of at least 1, not 2.0"),
        (GOOD | {"difficulty": True}, "of at least 1, not true"),
        (GOOD | {"difficulty": "3"}, 'of at least 1, not "3"'),
        (GOOD | {"difficulty": 2**31}, "of at least 1, not 2147483648"),
        (GOOD | {"metadata": []}, '"metadata" must be a JSON object {...}, not []'),
        (GOOD | {"dificulty": 3}, 'unknown key "dificulty": did you mean "difficulty"?'),
        (GOOD | {"source": "mbpp"}, 'unknown key "source": move it into "metadata"'),
        ([GOOD], "must be a JSON object {...}, not [{"),
        ("text", 'must be a JSON object {...}, not "text"'),
        (None, "must be a JSON object {...}, not null"),
    ],
)
def test_a_wrong_value_names_file_line_and_key(found, message):
    said = complaint(json.dumps(found).encode())
    assert said.startswith("train.jsonl:7: ")
    assert message in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"problem_id": "p", ', "not JSON: Expecting property name enclosed in double quotes (column 21)"),
        (b"{'problem_id': 'p'}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b'{"problem_id": "p"} {"problem_id": "q"}', "not JSON: Extra data (column 21)"),
        (b'{"problem_id": "p" "q"}', "not JSON: Expecting ',' delimiter (column 20)"),
        (b'{"problem_id": "a\tb"}', "not JSON: Invalid control character at (column 18)"),
        (b'{"difficulty": NaN}', "not JSON: NaN is not JSON"),
        (b'{"difficulty": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"output": "\xff"}', "not UTF-8 text (byte 13 of the line)"),
        (b"\x1f\x8b\x08\x00", "not UTF-8 text (byte 2 of the line): a data file is UTF-8 JSONL, not compressed"),
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        (b'{"metadata": {"a": 1, "a": 2}}', '"a" occurs twice in one object'),
        (b'{"is_correct": true, "is_correct": false}', '"is_correct" occurs twice in one object'),
        (b'{"metadata": ' + b"[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD | {"input": "ok\ud800"}).encode(), '"input" holds half a surrogate pair (character 3)'),
    ],
)
def test_a_line_that_is_no_json_names_file_and_line(line, message):
    said = complaint(line)
    assert said.startswith("train.jsonl:7: ")
    assert message in said
    assert len(said) < 300


@given(st.binary())
def test_any_bytes_are_a_row_or_a_user_error(line):
    with pytest.raises(UserError, match=r"^f:3: "):
        parse_row(line, "f", 3)


def test_lines_have_their_offset_and_number():
    assert list(read_lines(io.BytesIO(b"ab\n\n\r\ncd"), "f")) == [
        (0, 1, b"ab\n"),
        (3, 2, b"\n"),
        (4, 3, b"\r\n"),
        (6, 4, b"cd"),
    ]


def test_a_file_without_line_ends_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 2**20)
    handle = io.BytesIO(b"short\n" + b"x" * 2**22)
    with pytest.raises(UserError, match=r"^f:2: the line is longer than 1 MiB"):
        list(read_lines(handle, "f"))
    assert handle.tell() <= 2**20 + 7
