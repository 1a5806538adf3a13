"""Files of every container give the same rows, and broken ones say where they break."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bento_service.errors import InvalidDataset
from bento_service.training import containers, row_bounds
from bento_service.training.preferences import check_file, load_rows, require_valid
from bento_service.training.row_bounds import UNBOUNDED, Bounds

ROWS = [
    {"prompt": f'Say "{i}", [or] {{not}}\\', "chosen": f"First line\n, {i} café", "rejected": "no " * (i % 7 + 1)}
    for i in range(200)
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in ROWS
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def array(rows: list[dict[str, Any]]) -> bytes:
    return b"\xef\xbb\xbf \n" + json.dumps(rows, indent=2, ensure_ascii=False).encode()


def comma_separated(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["score", *rows[0]])
    writer.writeheader()
    writer.writerows({"score": 1, **row} for row in rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


WRITERS = {"jsonl": jsonl, "json": array, "csv": comma_separated, "parquet": parquet}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a-name-that-says-nothing"


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("container", "rows"),
    [(name, ROWS) for name in WRITERS] + [(name, MESSAGES) for name in WRITERS if name != "csv"],
)
def test_every_container_gives_the_same_rows(
    file: Path, container: str, rows: list[dict[str, Any]], gzipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_bounds, "CHUNK_BYTES", 100)  # rows cross the bounds of what is read at once
    content = WRITERS[container](rows)
    file.write_bytes(gzip.compress(content) if gzipped else content)
    report = require_valid(file)
    assert (report.container, report.gzipped, report.rows) == (container, gzipped, len(rows))
    assert list(load_rows(file)) == rows


@pytest.mark.parametrize("container", WRITERS)
def test_bad_rows_are_numbered_in_every_container(file: Path, container: str) -> None:
    rows = [{**row, "chosen": ""} if number in (3, 40) else row for number, row in enumerate(ROWS, start=1)]
    file.write_bytes(WRITERS[container](rows))
    report = check_file(file)
    assert [(problem.row, problem.field, problem.message) for problem in report.problems] == [
        (3, "chosen", "is empty"),
        (40, "chosen", "is empty"),
    ]


def test_null_columns_of_parquet_are_missing(file: Path) -> None:
    file.write_bytes(parquet([ROWS[0], {"prompt": "p", "chosen": "c", "rejected": None}]))
    problem = check_file(file).problems[0]
    assert (problem.row, problem.field, problem.message) == (2, "rejected", "is missing")


def test_values_of_parquet_that_are_no_text_are_named(file: Path) -> None:
    file.write_bytes(parquet([{"prompt": "p", "chosen": float("nan"), "rejected": b"bytes"}]))
    assert [problem.message.rpartition(", ")[2] for problem in check_file(file).problems] == ["not NaN", "not bytes"]


def test_broken_utf8_is_the_defect_of_its_row_only(file: Path) -> None:
    broken = b"caf\xe9"
    for content in (
        jsonl(ROWS[:3]).replace(b"caf\\u00e9", broken, 1),
        comma_separated(ROWS[:3]).replace("café".encode(), broken, 1),
        array(ROWS[:3]).replace("café".encode(), broken, 1),
        parquet(ROWS[:3], use_dictionary=False, compression="none", write_statistics=False).replace(
            "café".encode(), broken + b"x", 1
        ),
    ):
        file.write_bytes(content)
        report = check_file(file)
        assert (report.rows, report.counts) == (3, {"not_utf8": 1}), content[:10]
        assert report.problems[0].row == 1


@pytest.mark.parametrize(
    ("content", "row", "reason"),
    [
        (b"PK\x03\x04 and so on", 1, "a zip archive or a spreadsheet"),
        ("prompt".encode("utf-16"), 1, "UTF-16 text"),
        (gzip.compress(gzip.compress(jsonl(ROWS))), 1, "gzipped twice"),
        (b"hello\nworld", 1, "neither JSON nor a CSV header"),
        (b"prompt;chosen;rejected\na;b;c", 1, "use commas"),
        (b"prompt,prompt,chosen\na,b,c", 1, "names prompt twice"),
        (b'prompt,chosen,rejected\na,b,c\nd,e\nf,"g', 2, "has 2 cells and the header 3"),
        (b'prompt,chosen,rejected\na,b,c\nf,"g', 2, "is not CSV"),
        (gzip.compress(jsonl(ROWS), 0)[:-20], 200, "gzip data breaks"),
        (b"\x1f\x8b broken", 1, "is broken gzip"),
        (array(ROWS)[:-30], 200, "the file ends before the array is closed"),
        (array(ROWS[:2]) + b"[]", 3, "after the end of the JSON array"),
        (b'[{"prompt": 1},]', 2, "nothing between two commas"),
        (b'[{"a": 1}}', 2, "a } closes the array"),
        (parquet(ROWS)[:-20], 1, "where the Parquet file breaks"),
        (parquet([{"question": "a"}]), 1, "no known column; the Parquet file has question"),
    ],
)
def test_a_broken_container_says_where_and_what(file: Path, content: bytes, row: int, reason: str) -> None:
    file.write_bytes(content)
    report = check_file(file)
    found = next(problem for problem in report.problems if reason in problem.message)
    assert found.row == row
    with pytest.raises(InvalidDataset):
        require_valid(file)
    with pytest.raises((InvalidDataset, KeyError)):
        list(load_rows(file))


def test_an_empty_array_is_an_empty_file(file: Path) -> None:
    for content in (b" [ ] ", gzip.compress(b""), b"prompt,chosen,rejected\n"):
        file.write_bytes(content)
        with pytest.raises(InvalidDataset, match="is empty"):
            require_valid(file)


@pytest.mark.parametrize("container", ["jsonl", "json", "csv"])
def test_a_gzip_bomb_is_not_unpacked(file: Path, container: str) -> None:
    file.write_bytes(gzip.compress(WRITERS[container](ROWS * 100)))
    report = check_file(file, bounds=Bounds(unpacked_bytes=100_000))
    assert report.counts["too_long"] == 1
    assert "passes 100000 bytes" in report.problems[-1].message
    assert 0 <= report.rows < len(ROWS) * 100


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_parquet_bomb_is_not_unpacked(file: Path, gzipped: bool) -> None:
    # One value, stored once, many times: what the metadata says is small, what is decoded is not.
    content = parquet([{**ROWS[0], "chosen": "x" * 10_000}] * 2000, compression="gzip")
    assert len(content) < 20_000
    file.write_bytes(gzip.compress(content) if gzipped else content)
    report = check_file(file, bounds=Bounds(unpacked_bytes=1_000_000))
    assert report.rows < 200
    assert "passes 1000000 bytes" in report.problems[-1].message


@pytest.mark.parametrize("container", ["json", "csv", "parquet"])
def test_a_row_without_end_is_not_read_whole(file: Path, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_bounds, "CHUNK_BYTES", 100)
    rows = [ROWS[0], {**ROWS[1], "prompt": "x" * 3000}]
    file.write_bytes(WRITERS[container](rows))
    problem = check_file(file, bounds=Bounds(row_bytes=500)).problems[0]
    assert problem.row == 2
    assert "is longer than" in problem.message


SHORT = st.text(alphabet='"\\[]{},: aé\n', max_size=8)


@given(st.lists(st.dictionaries(SHORT, SHORT | st.integers() | st.none() | st.lists(SHORT, max_size=3), max_size=3)))
def test_any_array_is_cut_where_json_cuts_it(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "rows"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row for _, row in containers.read(path, containers.Container("json", False), (), UNBOUNDED)] == rows
