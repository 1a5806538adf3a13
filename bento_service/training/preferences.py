"""Checking a data file row by row, and reading it for a recipe.

``containers`` makes rows of a file, ``row_formats`` knows what rows may hold. All rows of a file have one format;
columns that are not part of it are ignored.
"""

from collections.abc import Hashable, Iterator
from pathlib import Path

from bento_service.errors import InvalidDataset
from bento_service.training import containers
from bento_service.training.dataset_report import (
    DatasetReport,
    Defect,
    Findings,
    Purpose,
    Row,
    problem_of,
    sentence,
)
from bento_service.training.row_formats import COLUMNS, FORMATS, Format, format_of

SHOWN_PROBLEMS = 3  # problems written out in the message of InvalidDataset

# Equal rows are looked for among this many different ones, the first of the file. One takes about 100 bytes, 8 of
# them the row's digest.
MAX_DIGESTS = 1_000_000

# What a compressed file may unpack to, by default as much as the default of TRL_MAX_FILE_BYTES.
MAX_UNPACKED_BYTES = 5 * 2**30


def check_file(path: Path, *, cap: int = 100, max_bytes: int | None = MAX_UNPACKED_BYTES) -> DatasetReport:
    """Check every row of a data file, holding one row in memory at a time.

    ``cap`` bounds the problems that are listed, ``max_bytes`` what a compressed file may unpack to (None: no bound).
    Raises OSError when the file cannot be read; everything wrong inside it is in the report.
    """
    container = containers.identify(path, COLUMNS)
    findings = Findings(cap=cap)
    seen: dict[int, int] = {}
    first: tuple[int, Format] | None = None
    rows = 0
    for number, row in containers.read(path, container, COLUMNS, max_bytes=max_bytes):
        rows += 1
        if isinstance(row, Defect):
            findings.refuse(number, [row])
            continue
        shape = format_of(row)
        if first is None:
            first = (number, shape)
        if shape is not first[1]:
            reason = f"is {shape.name} although row {first[0]} is {first[1].name}: use one format"
            findings.refuse(number, [Defect("mixed_formats", None, reason)])
        elif defects := shape.defects(row):
            findings.refuse(number, defects)
        elif original := _first_like(shape.identity(row), number, seen):
            findings.warn(number, Defect("duplicate", None, f"says the same as row {original}"))
    return DatasetReport(
        container=container.name,
        gzipped=container.gzipped,
        format=first[1].name if first else None,
        purpose=first[1].purpose if first else None,
        rows=rows,
        bad_rows=findings.bad_rows,
        problems=tuple(findings.problems),
        total_problems=findings.total_problems,
        counts=dict(findings.counts),
        warnings=tuple(findings.warnings),
        total_warnings=findings.total_warnings,
    )


def require_valid(
    path: Path,
    param: str = "training_file",
    *,
    cap: int = 100,
    max_bytes: int | None = MAX_UNPACKED_BYTES,
    method: Purpose = "dpo",
) -> DatasetReport:
    """The report of a file that jobs of ``method`` can train on.

    Raises InvalidDataset otherwise: defects, no rows, rows for another method. ``param`` is the request field that
    named the file; ``cap`` and ``max_bytes`` are those of ``check_file``.
    """
    report = check_file(path, cap=cap, max_bytes=max_bytes)
    if report.rows == 0:
        raise InvalidDataset(f"{param} is empty: it needs at least one row with {_wanted(method)}", param=param)
    if report.purpose is not None and report.purpose != method:
        raise InvalidDataset(
            f"{param} holds rows of the format {report.format}, which are for {report.purpose} jobs: "
            f"a {method} job needs {_wanted(method)}",
            param=param,
            problems=report.problems,
            total=report.total_problems,
        )
    if report.total_problems:
        shown = "; ".join(sentence(problem) for problem in report.problems[:SHOWN_PROBLEMS])
        more = report.total_problems - min(SHOWN_PROBLEMS, len(report.problems))
        raise InvalidDataset(
            f"{param}: {report.bad_rows} of {report.rows} rows cannot be trained on: {shown}"
            + (f"; and {more} more problems" if more else ""),
            param=param,
            problems=report.problems,
            total=report.total_problems,
        )
    return report


def load_rows(path: Path) -> Iterator[Row]:
    """The rows of a checked file in TRL's form: the format's columns only, messages of role and content only.

    Raises InvalidDataset for a row that is none, KeyError or TypeError for another defect that ``check_file`` would
    report.
    """
    container = containers.identify(path, COLUMNS)
    for number, row in containers.read(path, container, COLUMNS):
        if isinstance(row, Defect):
            problem = problem_of(number, row)
            raise InvalidDataset(sentence(problem), problems=[problem])
        yield format_of(row).for_trl(row)


def _wanted(method: Purpose) -> str:
    """The columns of the formats that a method trains on."""
    formats = [", ".join(shape.columns) for shape in FORMATS if shape.purpose == method]
    return " or ".join(dict.fromkeys(reversed(formats)))


def _first_like(identity: Hashable, number: int, seen: dict[int, int]) -> int | None:
    """The number of the first row with this identity; None, and the row is remembered, when it is the first.

    Python's hash of text is 64 bits, keyed by the process: two of a million different rows share one with a
    probability of 3e-8, and nobody can make rows that do.
    """
    digest = hash(identity)
    if (original := seen.get(digest)) is not None:
        return original
    if len(seen) < MAX_DIGESTS:
        seen[digest] = number
    return None
