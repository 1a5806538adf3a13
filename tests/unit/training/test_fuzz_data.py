"""Whatever bytes a data file has, the check ends with a report, and a file it calls valid can be read for training.

A longer run: ``FUZZ_EXAMPLES=20000 pytest tests/unit/training/test_fuzz_data.py``. Parquet has a twentieth of the
examples, because each one starts a process.
"""

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bento_service.errors import InvalidDataset
from bento_service.training.dataset_report import SHOWN_MESSAGE, SHOWN_VALUE, DefectCode, Method
from bento_service.training.preferences import load_rows, require_valid
from bento_service.training.row_bounds import Bounds

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
CAP = 20
BOUNDS = Bounds(row_bytes=100_000, rows=1000, unpacked_bytes=1_000_000)

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
methods = st.sampled_from(get_args(Method))


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {i}, \u00e9", "chosen": 'Yes, "it" is.', "rejected": "No.\nIt is not."} for i in range(3)
]
MESSAGES = [
    {"prompt": said("user", f"Hi {i}"), "chosen": said("assistant", "Yes"), "rejected": said("assistant", "No")}
    for i in range(3)
]


def table() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


LINES = b"\n".join(json.dumps(row).encode() for row in ROWS + MESSAGES)
TEXTS = {
    "jsonl": b"\n".join(json.dumps(row).encode() for row in MESSAGES),
    "mixed": LINES,
    "json": json.dumps(MESSAGES, indent=1).encode(),
    "csv": table(),
    "jsonl.gz": gzip.compress(LINES, mtime=0),
}
TABLES = {"text": parquet(ROWS), "messages": parquet(MESSAGES), "text.gz": gzip.compress(parquet(ROWS), mtime=0)}

STARTS = [
    b"",
    b"{",
    b"[",
    b"[{",
    b"prompt,chosen\n",
    b"PAR1",
    b"\x1f\x8b",
    b"\xef\xbb\xbf",
    b'{"prompt": "',
    b'[{"a": "',
]


@st.composite
def mutations(draw: st.DrawFn, sources: dict[str, bytes]) -> bytes:
    """A valid file with pieces cut out, put in, doubled or overwritten."""
    content = draw(st.sampled_from(list(sources.values())))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        piece = draw(
            st.binary(max_size=8)
            | st.sampled_from(
                [b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\\", b"\\ud800", b"null", b"NaN", b"1e999"]
            )
            | st.just(content[start:end] * 2)
        )
        content = content[:start] + piece + content[end:]
    return content


# Rows that are nearly right: known columns, roles and types, in any order and depth.
texts = st.sampled_from(["", " ", "Hi", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "\ud800", "\x00"]) | st.text(
    max_size=5
)
scalars = texts | st.none() | st.booleans() | st.integers() | st.floats()
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "weight", "tool_calls", "name"]),
        st.sampled_from(["user", "assistant", "system", "tool", "Hi", "Bye", 0, 1, None, [], ["x"]]) | scalars,
        max_size=4,
    )
    | scalars,
    max_size=4,
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
values = texts | messages | anything | st.fixed_dictionaries({"messages": messages})
names = ["prompt", "chosen", "rejected", "completion", "label", "messages"]
names += ["input", "preferred_output", "non_preferred_output", "tools", "other"]
columns = st.sampled_from(names)
rows = st.lists(st.dictionaries(columns, values, max_size=5) | anything, max_size=5)


def hold(path: Path, content: bytes, method: Method) -> None:
    """What holds of every file."""
    path.write_bytes(content)
    try:
        report = require_valid(path, method=method, cap=CAP, bounds=BOUNDS)
    except InvalidDataset as error:
        assert error.report is not None
        report = error.report
        assert not report.valid
    else:
        assert report.valid
        read = list(load_rows(path))
        assert len(read) == report.rows > 0
        assert all(
            isinstance(value, bool if column == "label" else str | list) and (column == "label" or value)
            for row in read
            for column, value in row.items()
        )
    json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False).encode()
    assert report.bad_rows <= report.rows <= 1001
    assert len(report.problems) == min(CAP, report.total_problems)
    assert report.total_problems + report.total_warnings == sum(report.counts.values())
    assert set(report.counts) <= set(get_args(DefectCode))
    numbers = [problem.row for problem in report.problems]
    assert numbers == sorted(numbers)
    for problem in report.problems:
        assert len(problem.value or "") <= SHOWN_VALUE
        assert len(problem.message) <= SHOWN_MESSAGE


@fuzzed
@given(st.sampled_from(STARTS), st.binary(max_size=300), methods, st.booleans())
def test_any_bytes(tmp_path: Path, start: bytes, content: bytes, method: Method, gzipped: bool) -> None:
    content = start + content
    hold(tmp_path / "rows", gzip.compress(content) if gzipped else content, method)


@fuzzed
@given(mutations(TEXTS), methods)
def test_valid_files_with_changes(tmp_path: Path, content: bytes, method: Method) -> None:
    hold(tmp_path / "rows", content, method)


@settings(fuzzed, max_examples=max(5, EXAMPLES // 20))
@given(mutations(TABLES))
def test_valid_parquet_files_with_changes(tmp_path: Path, content: bytes) -> None:
    hold(tmp_path / "rows", content, "dpo")


@settings(fuzzed, max_examples=EXAMPLES // 2)
@given(rows, methods, st.booleans())
def test_any_json(tmp_path: Path, rows: list[Any], method: Method, lines: bool) -> None:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    hold(tmp_path / "rows", text.encode(), method)


@settings(fuzzed, max_examples=max(5, EXAMPLES // 20))
@given(rows)
def test_any_rows_as_parquet(tmp_path: Path, rows: list[Any]) -> None:
    try:
        content = parquet([row for row in rows if isinstance(row, dict) and row])
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
        return  # types that Parquet cannot mix
    hold(tmp_path / "rows", content, "dpo")
