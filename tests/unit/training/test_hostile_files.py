"""A file made to exhaust the service is answered with what is wrong with it, in little memory and time.

The bounds are small here, and so are the files; what is held is that memory follows the bounds and not the file.
"""

import gzip
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bento_service.training.dataset_report import DatasetReport
from bento_service.training.preferences import check_file
from bento_service.training.row_bounds import Bounds

MEBIBYTE = 2**20
BOUNDS = Bounds(row_bytes=MEBIBYTE, rows=1000, unpacked_bytes=48 * MEBIBYTE, parquet_bytes=512 * MEBIBYTE)
MOST_MEMORY = 16 * MEBIBYTE  # a row, what is read at once, and the objects made of them

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}'


def parquet(column: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), buffer, **options)
    return buffer.getvalue()


def repeated(value: str, times: int) -> Any:
    """One row: a list that names one value many times, as Parquet's dictionaries do."""
    named = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), pyarrow.array([value]))
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, times], pyarrow.int32()), named)


def nulls(times: int) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, times], pyarrow.int32()), pyarrow.nulls(times))


FILES: dict[str, tuple[Callable[[], bytes], int, str, str]] = {
    # how it is made, the row that is reported, its code, and a part of the message
    "a line without end": (lambda: GOOD + b"\n" + b"x" * 32 * MEBIBYTE, 2, "too_long", "longer than 1 MiB"),
    "a long row between others": (
        lambda: b"\n".join([GOOD, b'{"prompt": "' + b"x" * 4 * MEBIBYTE + b'"}', GOOD]),
        2,
        "too_long",
        "longer than 1 MiB",
    ),
    "an item without end": (lambda: b'[{"prompt": "' + b"x" * 32 * MEBIBYTE, 1, "too_long", "lacks a quote"),
    "a cell without end": (lambda: b'prompt,chosen\na,"' + b"x" * 32 * MEBIBYTE, 1, "too_long", "lacks a closing"),
    "a header of many columns": (
        lambda: b"prompt," + b",".join(b"%d" % i for i in range(100_000)) + b"\nx",
        1,
        "cells",
        "has 1 cells and the header 100001",
    ),
    "a header without end": (lambda: b"prompt," + b"x" * 2 * MEBIBYTE, 1, "too_long", "lacks a closing quote"),
    "nested lines": (lambda: b'{"prompt": ' + b"[" * 100_000, 1, "too_deep", "more than 200 levels"),
    "nested lists": (lambda: b"[" * 100_000 + b"]" * 100_000, 1, "too_deep", "more than 200 levels"),
    # The fast parser ends at NaN; the one that explains reads on.
    "deeper than the first parser got": (
        lambda: b'{"a": "\\ud800", "prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
        1,
        "too_deep",
        "more than 200 levels",
    ),
    "many rows": (lambda: b"\n".join([GOOD] * 2000), 1001, "too_many_rows", "1000 rows"),
    "many blank lines": (lambda: GOOD + b"\n" * 100_000, 1001, "too_many_rows", "1000 rows"),
    "many items": (lambda: b"[" + b"{}," * 2000 + b"{}]", 1001, "too_many_rows", "1000 rows"),
    "many blank lines of CSV": (
        lambda: b"prompt,chosen\n" + b"\n" * 100_000 + b"a,b\n",
        1001,
        "too_many_rows",
        "1000",
    ),
    "many rows of Parquet": (lambda: parquet(["p"] * 2000), 1001, "too_many_rows", "1000 rows"),
    "a gzip bomb": (lambda: gzip.compress(b" " * 64 * MEBIBYTE), 1, "too_long", "the unpacked file passes"),
    "a gzip bomb of rows": (lambda: gzip.compress(GOOD + b"\n" + b"x" * 64 * MEBIBYTE), 2, "too_long", "passes"),
    "a gzipped Parquet bomb": (
        lambda: gzip.compress(b"PAR1" + b" " * 64 * MEBIBYTE + b"PAR1"),
        1,
        "too_long",
        "the unpacked file passes",
    ),
    "Parquet that claims much": (
        lambda: parquet(["x" * 8 * MEBIBYTE] * 8, use_dictionary=False, compression="gzip"),
        1,
        "too_long",
        "the unpacked file passes",
    ),
    "a value named often": (
        lambda: parquet(repeated("x" * MEBIBYTE, 5000)),
        1,
        "unreadable",
        "takes more than 536870912 bytes of memory",
    ),
    "a value named often, by what Parquet itself calls its type": (
        lambda: parquet(repeated("x" * MEBIBYTE, 5000), store_schema=False),
        1,
        "unreadable",
        "takes more than 536870912 bytes of memory",
    ),
    "a list of nothing": (lambda: parquet(nulls(5_000_000)), 1, "too_long", "longer than 1 MiB"),
    "a cut Parquet file": (lambda: parquet(["p"] * 9)[:-2], 1, "unreadable", "as if it were cut off"),
    "a Parquet file of nothing": (lambda: b"PAR1" * 3, 1, "unreadable", "where the Parquet file breaks"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_answered_in_bounded_memory(tmp_path: Path, name: str) -> None:
    make, row, code, message = FILES[name]
    path = tmp_path / "rows"
    path.write_bytes(make())
    report, peak = measured(path)
    found = next(problem for problem in report.problems if problem.code == code)
    assert (found.row, message in found.message) == (row, True), found
    assert peak < MOST_MEMORY


def measured(path: Path) -> tuple[DatasetReport, int]:
    """The report, and the most bytes that Python's objects took while it was made."""
    tracemalloc.start()
    try:
        return check_file(path, bounds=BOUNDS, cap=5000), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_names_that_a_file_gives_are_repeated_shortened(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    long = "x" * 100_000
    path.write_text(f'{{"{long}": "\\ud800", "prompt": "p"}}\n{{"{long}": 1}}\n{{"prompt": "{long}", "chosen": ""}}')
    problems = check_file(path).problems
    assert {problem.row for problem in problems} == {1, 2, 3}
    assert max(len(f"{problem.field}{problem.message}{problem.value}") for problem in problems) < 1200


def test_the_decoder_of_parquet_that_crashes_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "crashing.py"
    crashing.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr("bento_service.training.parquet_process.__file__", str(crashing))
    path = tmp_path / "rows"
    path.write_bytes(parquet(["p"]))
    report = check_file(path)
    assert [problem.message for problem in report.problems] == [
        "cannot be decoded: the Parquet decoder ended with signal 11"
    ]
