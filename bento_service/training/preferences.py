"""Preference rows: what a data file may hold, checking it, and reading it for a recipe.

A data file is JSON lines in UTF-8, one pair a line, all lines of one format. Blank lines are passed over; columns
that are not part of the format are ignored. The formats are TRL's (https://huggingface.co/docs/trl/dataset_formats):

    text               prompt, chosen, rejected: strings
    messages           prompt, chosen, rejected: lists of {"role", "content"}; the replies' roles are assistant's
    text-implicit      chosen, rejected: strings that begin with the same prompt
    messages-implicit  chosen, rejected: conversations that begin with the same messages

TRL itself trains silently on many broken rows (an empty reply, two equal replies), hence the checks here. A new
format is one function that yields a row's defects and one entry in ``FORMATS``.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from bento_service.errors import InvalidDataset, RowProblem

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})  # what chat templates know
MAX_ROW_BYTES = 16 * 2**20  # longest accepted line; a row is held in memory whole
SHOWN_VALUE = 80  # characters of an offending value that a problem repeats
SHOWN_PROBLEMS = 3  # problems written out in the message of InvalidDataset

Row = dict[str, Any]
Defect = tuple[str | None, str, object]  # field, reason, offending value (ABSENT: none to show)
ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Format:
    """One shape of row."""

    name: str
    columns: tuple[str, ...]  # what a recipe gets
    conversational: bool  # columns are lists of messages, not text
    matches: Callable[[Row], bool]  # whether a row, right or wrong, is meant to have this shape
    defects: Callable[[Row], Iterator[Defect]]  # what is wrong with it, nothing when it can be trained on


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a file holds. ``problems`` lists the defects up to the cap, ``total_problems`` counts all of them."""

    format: str | None  # of the first row that has one; None when no row has
    rows: int  # rows found, good and bad
    problems: tuple[RowProblem, ...]
    total_problems: int


def check_file(path: Path, *, cap: int = 100) -> DatasetReport:
    """Check every row of a data file, holding one row in memory at a time.

    Raises OSError when the file cannot be read; everything wrong inside it is in the report.
    """
    rows = total = 0
    first: tuple[int, Format] | None = None
    problems: list[RowProblem] = []
    for number, row in _parsed(path):
        rows += 1
        if isinstance(row, RowProblem):
            found: Iterable[RowProblem] = (row,)
        else:
            shape = format_of(row)
            if first is None:
                first = (number, shape)
            if shape is not first[1]:
                defects: Iterable[Defect] = [
                    (None, f"is {shape.name} although row {first[0]} is {first[1].name}: use one format", ABSENT)
                ]
            else:
                defects = shape.defects(row)
            found = (_problem(number, *defect) for defect in defects)
        for problem in found:
            total += 1
            if len(problems) < cap:
                problems.append(problem)
    return DatasetReport(
        format=first[1].name if first else None, rows=rows, problems=tuple(problems), total_problems=total
    )


def require_valid(path: Path, param: str = "training_file", *, cap: int = 100) -> DatasetReport:
    """The report of a file without defects. Raises InvalidDataset otherwise, also when it holds no rows.

    ``param`` is the request field that named the file; ``cap`` bounds the problems the error carries.
    """
    report = check_file(path, cap=cap)
    if report.rows == 0:
        raise InvalidDataset(
            f"{param} is empty: it needs at least one line of JSON with prompt, chosen and rejected", param=param
        )
    if report.total_problems:
        bad = {problem.row for problem in report.problems}
        shown = "; ".join(_sentence(problem) for problem in report.problems[:SHOWN_PROBLEMS])
        more = report.total_problems - min(SHOWN_PROBLEMS, len(report.problems))
        counted = f"at least {len(bad)}" if report.total_problems > len(report.problems) else str(len(bad))
        raise InvalidDataset(
            f"{param}: {counted} of {report.rows} rows cannot be trained on: {shown}"
            + (f"; and {more} more problems" if more else ""),
            param=param,
            problems=report.problems,
            total=report.total_problems,
        )
    return report


def load_rows(path: Path) -> Iterator[Row]:
    """The rows of a checked file in TRL's form: the format's columns only, messages of role and content only.

    Raises InvalidDataset for a line that is no JSON object, KeyError or TypeError for another defect that
    ``check_file`` would report.
    """
    for _, row in _parsed(path):
        if isinstance(row, RowProblem):
            raise InvalidDataset(_sentence(row), problems=[row])
        shape = format_of(row)
        if shape.conversational:
            yield {
                column: [{"role": message["role"], "content": message["content"]} for message in row[column]]
                for column in shape.columns
            }
        else:
            yield {column: row[column] for column in shape.columns}


def format_of(row: Row) -> Format:
    """The format a row is meant to have, judged by its columns and the type of its replies."""
    return next(shape for shape in FORMATS if shape.matches(row))


def _text(row: Row) -> Iterator[Defect]:
    sound = True
    for column in ("prompt", "chosen", "rejected"):
        for defect in _string_defects(row, column):
            sound = False
            yield defect
    if sound and row["chosen"] == row["rejected"]:
        yield ("rejected", "is the same as chosen: there is nothing to prefer", row["rejected"])


def _text_implicit(row: Row) -> Iterator[Defect]:
    defects = [defect for column in ("chosen", "rejected") for defect in _string_defects(row, column)]
    yield from defects
    if defects:
        return
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        yield ("rejected", "is the same as chosen: there is nothing to prefer", rejected)
        return
    # Where TRL's extract_prompt cuts: at the first difference, or before the space in front of it.
    common = _common_length(chosen, rejected)
    if not chosen[:common].strip():
        yield (None, "chosen and rejected begin differently: without a prompt column they must share one", ABSENT)
    for column in ("chosen", "rejected"):
        if not row[column][common:].strip():
            yield (column, "holds no reply after the beginning it shares with the other one", row[column])


def _messages(row: Row) -> Iterator[Defect]:
    sound = True
    for column in ("prompt", "chosen", "rejected"):
        for defect in _message_defects(row, column):
            sound = False
            yield defect
    if not sound:
        return
    last = row["prompt"][-1]
    if last["role"] == "assistant":
        yield ("prompt", "ends with the assistant: the reply needs something to reply to", last["content"])
    for column in ("chosen", "rejected"):
        for index in (0, -1):
            if row[column][index]["role"] != "assistant":
                place = f"{column}.{index % len(row[column])}.role"
                yield (place, "a reply begins and ends with the assistant", row[column][index]["role"])
                break
    if _spoken(row["chosen"]) == _spoken(row["rejected"]):
        yield ("rejected", "is the same as chosen: there is nothing to prefer", row["rejected"][-1]["content"])


def _messages_implicit(row: Row) -> Iterator[Defect]:
    defects = [defect for column in ("chosen", "rejected") for defect in _message_defects(row, column)]
    yield from defects
    if defects:
        return
    chosen, rejected = _spoken(row["chosen"]), _spoken(row["rejected"])
    if chosen == rejected:
        yield ("rejected", "is the same as chosen: there is nothing to prefer", row["rejected"][-1]["content"])
        return
    common = _common_length(chosen, rejected)
    if common == 0:
        yield (None, "chosen and rejected begin differently: without a prompt column they must share one", ABSENT)
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == common:
            yield (column, "holds no reply after the messages it shares with the other one", messages[-1][1])
            continue
        for index in (common, len(messages) - 1):
            if messages[index][0] != "assistant":
                yield (f"{column}.{index}.role", "a reply begins and ends with the assistant", messages[index][0])
                break


def _has_messages(row: Row) -> bool:
    return any(isinstance(row.get(column), list) for column in ("prompt", "chosen", "rejected"))


def _has_replies_only(row: Row) -> bool:
    return "prompt" not in row and ("chosen" in row or "rejected" in row)


# The first that matches a row is its format; the last takes every row.
FORMATS = (
    Format(
        name="messages-implicit",
        columns=("chosen", "rejected"),
        conversational=True,
        matches=lambda row: _has_messages(row) and _has_replies_only(row),
        defects=_messages_implicit,
    ),
    Format(
        name="messages",
        columns=("prompt", "chosen", "rejected"),
        conversational=True,
        matches=_has_messages,
        defects=_messages,
    ),
    Format(
        name="text-implicit",
        columns=("chosen", "rejected"),
        conversational=False,
        matches=_has_replies_only,
        defects=_text_implicit,
    ),
    Format(
        name="text",
        columns=("prompt", "chosen", "rejected"),
        conversational=False,
        matches=lambda row: True,
        defects=_text,
    ),
)


def _string_defects(row: Row, column: str) -> Iterator[Defect]:
    if column not in row:
        yield (column, "is missing", ABSENT)
        return
    value = row[column]
    if not isinstance(value, str):
        yield (column, f"must be text, as the other columns are, not {_kind(value)}", value)
    else:
        yield from _content_defects(value, column)


def _message_defects(row: Row, column: str) -> Iterator[Defect]:
    if column not in row:
        yield (column, "is missing", ABSENT)
        return
    messages = row[column]
    if not isinstance(messages, list):
        yield (column, f"must be a list of messages, as the other columns are, not {_kind(messages)}", messages)
        return
    if not messages:
        yield (column, "has no messages", messages)
    for index, message in enumerate(messages):
        place = f"{column}.{index}"
        if not isinstance(message, dict):
            yield (place, f'must be {{"role": ..., "content": ...}}, not {_kind(message)}', message)
            continue
        if "role" not in message:
            yield (f"{place}.role", "is missing", ABSENT)
        elif not isinstance(message["role"], str) or message["role"] not in ROLES:
            yield (f"{place}.role", f"must be one of {', '.join(sorted(ROLES))}", message["role"])
        if "content" not in message:
            yield (f"{place}.content", "is missing", ABSENT)
        elif not isinstance(message["content"], str):
            yield (f"{place}.content", f"must be text, not {_kind(message['content'])}", message["content"])
        else:
            yield from _content_defects(message["content"], f"{place}.content")


def _content_defects(text: str, place: str) -> Iterator[Defect]:
    if not text.strip():
        yield (place, "is empty" if not text else "is only white space", text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield (place, f"holds half of a surrogate pair at character {error.start}", ascii(text))


def _parsed(path: Path) -> Iterator[tuple[int, Row | RowProblem]]:
    """Line number and row of every line that is not blank; a RowProblem for a line that is no JSON object."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW_BYTES)
                yield number, _problem(number, None, f"is longer than {MAX_ROW_BYTES // 2**20} MiB", ABSENT)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse(number, line)


def _parse(number: int, line: bytes) -> Row | RowProblem:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _problem(number, None, f"is not UTF-8 at byte {error.start}", line.decode("utf-8", "replace"))
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return _problem(number, None, f"is not JSON: {error.msg} at column {error.colno}", text.strip())
    except (ValueError, RecursionError) as error:  # a number too long, NaN, or nesting too deep
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        return _problem(number, None, f"is not JSON: {reason}", text.strip())
    if not isinstance(row, dict):
        return _problem(number, None, f"must be a JSON object, not {_kind(row)}", row)
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _problem(row: int, field: str | None, reason: str, value: object) -> RowProblem:
    if value is ABSENT:
        return RowProblem(row=row, field=field, reason=reason)
    shown = value if isinstance(value, str) else json.dumps(value)
    if len(shown) > SHOWN_VALUE:
        shown = shown[: SHOWN_VALUE - 3] + "..."
    # An answer that repeats a lone surrogate could not be encoded itself.
    return RowProblem(row=row, field=field, reason=reason, value=shown.encode("utf-8", "replace").decode())


def _sentence(problem: RowProblem) -> str:
    place = f"row {problem.row}" + (f", {problem.field}" if problem.field else "")
    return f"{place} {problem.reason}"


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _spoken(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _common_length(a: Any, b: Any) -> int:
    """How many leading items two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
