"""What the check of a data file found: defects of rows, and the report of the whole file."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bento_service.errors import RowProblem

SHOWN_VALUE = 80  # characters of an offending value that a problem repeats

Row = dict[str, Any]
ABSENT = object()

# What a file of rows is for: pairs for "dpo", conversations and completions for "supervised".
Purpose = Literal["dpo", "supervised"]

DefectCode = Literal[
    "not_json",
    "not_utf8",
    "not_an_object",
    "too_long",
    "too_deep",
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
class DatasetReport:
    """What a file holds. ``problems`` and ``warnings`` are listed up to the cap; the totals count all of them.

    Row numbers are lines of JSON Lines; in the other containers they count the rows, from 1 and without CSV's header.
    """

    container: str | None  # jsonl, json, csv or parquet; None for an empty file or an unknown container
    gzipped: bool
    format: str | None  # of the first row that has one; None when no row has
    purpose: Purpose | None  # the method whose jobs can train on this format
    rows: int  # rows found, good and bad
    bad_rows: int
    problems: tuple[RowProblem, ...]
    total_problems: int
    counts: dict[DefectCode, int]  # problems and warnings by code
    warnings: tuple[RowProblem, ...]
    total_warnings: int


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
    if defect.value is ABSENT:
        return RowProblem(row=row, field=defect.field, reason=defect.reason)
    shown = defect.value if isinstance(defect.value, str) else json.dumps(defect.value, default=str)
    if len(shown) > SHOWN_VALUE:
        shown = shown[: SHOWN_VALUE - 3] + "..."
    # An answer that repeats a lone surrogate could not be encoded itself.
    value = shown.encode("utf-8", "replace").decode()
    return RowProblem(row=row, field=defect.field, reason=defect.reason, value=value)


def sentence(problem: RowProblem) -> str:
    place = f"row {problem.row}" + (f", {problem.field}" if problem.field else "")
    return f"{place} {problem.reason}"


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
