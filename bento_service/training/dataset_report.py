"""What the check of a data file found: defects of rows, and the report of the whole file."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

SHOWN_VALUE = 80  # characters of an offending value that a problem repeats
SHOWN_MESSAGE = 500  # and of names that a file gives: of columns, of fields

Row = dict[str, Any]
ABSENT = object()

# The methods of training that rows can be for.
Method = Literal["dpo", "supervised", "kto", "reward"]

DefectCode = Literal[
    "not_json",
    "not_utf8",
    "not_an_object",
    "too_long",
    "too_deep",
    "too_many_rows",
    "unreadable",  # the container is broken or unknown; what comes after is not read
    "cells",  # a CSV row with more or fewer cells than the header
    "mixed_formats",
    "missing",
    "wrong_type",
    "empty",
    "surrogate",
    "unknown_role",
    "role_order",
    "equal_replies",
    "no_shared_prompt",
    "no_reply",
    "unsupported",
    "duplicate",  # a warning
]


class Defect(NamedTuple):
    """One thing wrong with a row. ``value`` is the offending value, ABSENT when there is none to show."""

    code: DefectCode
    field: str | None  # dotted path inside the row, None for the whole row
    reason: str
    value: object = ABSENT


@dataclass(frozen=True, kw_only=True)
class RowProblem:
    """One defect of one row of a data file."""

    row: int  # from 1: lines of JSON Lines; in the other containers rows, without CSV's header
    field: str | None  # dotted path inside the row, None for the whole row
    code: DefectCode
    message: str  # what is wrong, said of the row's field, or of the row: "is empty"
    value: str | None = None  # the offending value, shortened to SHOWN_VALUE characters

    def sentence(self) -> str:
        return f"row {self.row}" + (f", {self.field}" if self.field else "") + f" {self.message}"


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a file holds, and whether jobs of ``method`` can train on it.

    ``problems`` and ``warnings`` are listed up to the cap, in the order of the rows; the totals and the counts
    have all of them. ``to_json`` gives the same names and values:

        {"valid": false,
         "refusal": "has 1 of 3 rows that cannot be trained on: row 2, chosen is empty",
         "method": "dpo", "container": "jsonl", "gzipped": false,
         "format": "text", "formats": {"text": 3}, "methods": ["dpo", "reward"],
         "rows": 3, "bad_rows": 1,
         "problems": [{"row": 2, "field": "chosen", "code": "empty", "message": "is empty", "value": ""}],
         "total_problems": 1,
         "counts": {"empty": 1, "duplicate": 1},
         "warnings": [{"row": 3, "field": null, "code": "duplicate", "message": "says the same as row 1",
                       "value": null}],
         "total_warnings": 1}
    """

    refusal: str | None  # why such jobs cannot, said of the file; None when they can
    method: Method  # what the file was checked for
    container: str | None  # jsonl, json, csv or parquet; None for an empty file or an unknown container
    gzipped: bool
    format: str | None  # the one that most rows have, of equally many the first; None when no row has one
    formats: dict[str, int]  # rows by format, of those that have one; good files have one format
    methods: tuple[Method, ...]  # those that can train on ``format``
    rows: int  # rows found, good and bad
    bad_rows: int
    problems: tuple[RowProblem, ...]
    total_problems: int
    counts: dict[DefectCode, int]  # problems and warnings by code
    warnings: tuple[RowProblem, ...]
    total_warnings: int

    @property
    def valid(self) -> bool:
        return self.refusal is None

    def to_json(self) -> dict[str, Any]:
        return {"valid": self.valid} | asdict(self)


@dataclass(kw_only=True)
class Findings:
    """Collects a report's problems and warnings; each list is bounded by ``cap``."""

    cap: int
    bad_rows: int = 0
    problems: list[RowProblem] = field(default_factory=list)
    warnings: list[RowProblem] = field(default_factory=list)
    counts: Counter[DefectCode] = field(default_factory=Counter)
    total_problems: int = 0
    total_warnings: int = 0

    def refuse(self, row: int, defects: list[Defect]) -> None:
        """Note a row that cannot be trained on; ``defects`` is not empty."""
        self.bad_rows += 1
        self.total_problems += len(defects)
        self.counts.update(defect.code for defect in defects)
        room = self.cap - len(self.problems)
        self.problems.extend(problem_of(row, defect) for defect in defects[: max(0, room)])

    def warn(self, row: int, defect: Defect) -> None:
        self.total_warnings += 1
        self.counts[defect.code] += 1
        if len(self.warnings) < self.cap:
            self.warnings.append(problem_of(row, defect))


def problem_of(row: int, defect: Defect) -> RowProblem:
    """The defect of one row as an answer shows it."""
    value = None
    if defect.value is not ABSENT:
        value = shortened(defect.value if isinstance(defect.value, str) else json.dumps(defect.value, default=str))
    return RowProblem(
        row=row,
        field=None if defect.field is None else shortened(defect.field, SHOWN_MESSAGE),
        code=defect.code,
        message=shortened(defect.reason, SHOWN_MESSAGE),
        value=value,
    )


def shortened(text: str, length: int = SHOWN_VALUE) -> str:
    """A text out of a file as an answer can repeat it: a lone surrogate could not be encoded."""
    if len(text) > length:
        text = text[: length - 3] + "..."
    return text.encode("utf-8", "replace").decode()


def kind(value: object) -> str:
    """The JSON name of a value's type; NaN by its own name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def text_defects(row: Row, columns: Iterable[str]) -> list[Defect]:
    """What is wrong with columns that must hold text."""
    defects: list[Defect] = []
    for column in columns:
        value = row.get(column, ABSENT)
        if isinstance(value, str):
            if not value or value.isspace():
                defects.append(empty(value, column))
        elif value is ABSENT:
            defects.append(Defect("missing", column, "is missing"))
        else:
            reason = f"must be text, as the other columns are, not {kind(value)}"
            defects.append(Defect("wrong_type", column, reason, value))
    return defects


def empty(text: str, place: str) -> Defect:
    return Defect("empty", place, "is only white space" if text else "is empty", text)
