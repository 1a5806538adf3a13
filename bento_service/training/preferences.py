"""Checking a data file row by row, and reading it for a recipe.

``containers`` makes rows of a file, ``row_formats`` knows what rows may hold, ``row_census`` which format a file has.
All rows of a file have one format; columns that are not part of it are ignored.
"""

from collections.abc import Hashable, Iterator
from pathlib import Path

from bento_service.errors import InvalidDataset
from bento_service.training import containers
from bento_service.training.dataset_report import DatasetReport, Defect, Findings, Method, Row, problem_of
from bento_service.training.recipes import RECIPES
from bento_service.training.row_bounds import DEFAULT_BOUNDS, UNBOUNDED, Bounds
from bento_service.training.row_census import Census
from bento_service.training.row_formats import COLUMNS, FORMATS, Format, format_of

SHOWN_PROBLEMS = 3  # problems written out in the message of InvalidDataset

# Equal rows are looked for among this many different ones, the first of the file. One takes about 100 bytes, 8 of
# them the row's digest.
MAX_DIGESTS = 1_000_000


def check_file(
    path: Path, *, method: Method = "dpo", cap: int = 100, bounds: Bounds = DEFAULT_BOUNDS
) -> DatasetReport:
    """Check every row of a data file for jobs of ``method``, holding one row in memory at a time.

    ``cap`` bounds the problems that are listed, ``bounds`` what is read at all. Raises OSError when the file cannot be
    read; everything wrong inside it is in the report.
    """
    container = containers.identify(path, COLUMNS)
    census = Census(cap)
    seen: dict[int, int] = {}
    shape: Format | None = None
    rows = 0
    for number, row in containers.read(path, container, COLUMNS, bounds):
        rows += 1
        if isinstance(row, Defect):
            census.add_broken(number, row)
            continue
        previous, shape = shape, format_of(row)
        if shape is None:
            census.add_shapeless(number, row)
            continue
        if shape is not previous:
            tally = census.tally(shape)
        tally.rows += 1
        if tally.rows <= cap:
            tally.numbers.append(number)
        if defects := shape.defects(row):
            tally.findings.refuse(number, defects)
        elif original := _first_like((shape.name, shape.identity(row)), number, seen):
            tally.findings.warn(number, Defect("duplicate", None, f"says the same as row {original}"))
    wanted = next(shape for shape in FORMATS if method in shape.methods)
    findings = census.findings(wanted)
    return DatasetReport(
        refusal=_refusal(census, findings, rows, method),
        method=method,
        container=container.name,
        gzipped=container.gzipped,
        format=census.format.name if census.format else None,
        formats=census.formats,
        methods=census.format.methods if census.format else (),
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
    method: Method = "dpo",
    cap: int = 100,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> DatasetReport:
    """The report of a file that jobs of ``method`` can train on; the arguments are those of ``check_file``.

    Raises InvalidDataset, with the report, otherwise: defects, no rows, rows for another method. ``param`` is the
    request field that named the file.
    """
    report = check_file(path, method=method, cap=cap, bounds=bounds)
    if report.refusal is not None:
        raise InvalidDataset(f"{param} {report.refusal}", param=param, report=report)
    return report


def load_rows(path: Path) -> Iterator[Row]:
    """The rows of a checked file in TRL's form: the format's columns only, messages of role and content only.

    Raises as ``numbered_rows``.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The same with each row's number, as reports have it.

    Raises InvalidDataset for a row that is none or has no format, KeyError or TypeError for another defect that
    ``check_file`` would report.
    """
    container = containers.identify(path, COLUMNS)
    for number, row in containers.read(path, container, COLUMNS, UNBOUNDED):
        if isinstance(row, Defect):
            raise InvalidDataset(problem_of(number, row).sentence())
        shape = format_of(row)
        if shape is None:
            raise InvalidDataset(f"row {number} has no column that tells its format")
        yield number, shape.for_trl(row)


def _refusal(census: Census, findings: Findings, rows: int, method: Method) -> str | None:
    """Why jobs of ``method`` cannot train on the file; None when they can."""
    shape = census.format
    if rows == 0:
        return f"is empty: it needs at least one row with {_wanted(method)}"
    if shape is not None and method not in shape.methods:
        # Rows of more methods than there are recipes for are told apart.
        offered = [name for name in shape.methods if name in RECIPES]
        return (
            f"holds rows of the format {shape.name}, which are for {' or '.join(shape.methods)} jobs: a {method} job "
            f"needs {_wanted(method)}. "
            + (f"Set the method to {' or '.join(offered)}, or give other rows" if offered else "Give other rows")
        )
    if not findings.total_problems:
        return None
    mixed = ""
    if not census.has_majority:
        counts = ", ".join(f"{name} {rows} rows" for name, rows in census.formats.items())
        mixed = f"has rows of several formats and none that most have ({counts}), and "
    shown = "; ".join(problem.sentence() for problem in findings.problems[:SHOWN_PROBLEMS])
    more = findings.total_problems - min(SHOWN_PROBLEMS, len(findings.problems))
    return f"{mixed}has {findings.bad_rows} of {rows} rows that cannot be trained on: {shown}" + (
        f"; and {more} more problems" if more else ""
    )


def _wanted(method: Method) -> str:
    """The columns of the formats that a method trains on."""
    formats = [", ".join(shape.columns) for shape in FORMATS if method in shape.methods]
    return " or ".join(dict.fromkeys(formats)).replace("label", "label (true or false)")


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
