"""Rows by format: which format is the file's, and which rows are odd.

The file's format is the one that most rows have, of equally many the one that comes first. Which one that is shows at
the end of the file only, so the findings are kept for each format apart; there are a dozen, each list has a cap.
"""

from collections import Counter
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice

from bento_service.training.dataset_report import Defect, Findings, Row, RowProblem, problem_of, shortened
from bento_service.training.row_formats import COLUMNS, Format


@dataclass
class Tally:
    """The rows of one format, counted by who finds them. ``numbers`` are the first ones', as many as can be listed."""

    shape: Format
    findings: Findings
    rows: int = 0
    numbers: list[int] = field(default_factory=list)


class Census:
    """All rows of a file, added one by one; ``cap`` bounds each list of problems."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._tallies: dict[str, Tally] = {}  # by the format's name, in the order of their first rows
        self._broken = Findings(cap=cap)  # what is no row
        # Rows without a column that tells their format: what they lack is known when the file's format is.
        self._shapeless: list[tuple[int, frozenset[str], str]] = []  # number, known columns, all columns as text
        self._shapeless_counts: Counter[frozenset[str]] = Counter()

    def tally(self, shape: Format) -> Tally:
        """The rows of this format, to add one to."""
        tally = self._tallies.get(shape.name)
        if tally is None:
            tally = self._tallies[shape.name] = Tally(shape, Findings(cap=self._cap))
        return tally

    def add_broken(self, number: int, defect: Defect) -> None:
        self._broken.refuse(number, [defect])

    def add_shapeless(self, number: int, row: Row) -> None:
        known = frozenset(row).intersection(COLUMNS)
        self._shapeless_counts[known] += 1
        if len(self._shapeless) < self._cap:
            self._shapeless.append((number, known, shortened(", ".join(islice(row, self._cap)))))

    @property
    def formats(self) -> dict[str, int]:
        """Rows by format, the most frequent first."""
        ranked = sorted(self._tallies.values(), key=lambda tally: -tally.rows)
        return {tally.shape.name: tally.rows for tally in ranked}

    @property
    def format(self) -> Format | None:
        """The file's format; None when no row has one."""
        return max(self._tallies.values(), key=lambda tally: tally.rows).shape if self._tallies else None

    @property
    def has_majority(self) -> bool:
        """Whether more than half of the rows that have a format have the file's."""
        return 2 * max(self.formats.values(), default=1) > sum(self.formats.values())

    def findings(self, wanted: Format) -> Findings:
        """What is wrong with the rows of the file; ``wanted`` is what its rows should be when none has a format."""
        shape = self.format or wanted
        own = self._tallies[shape.name].findings if shape.name in self._tallies else Findings(cap=self._cap)
        odd = [tally for tally in self._tallies.values() if tally.shape is not shape]
        parts = [own, self._broken, *(self._odd(tally, shape) for tally in odd), self._lacking(shape)]
        problems = merge(*(part.problems for part in parts), key=_row)
        return Findings(
            cap=self._cap,
            bad_rows=sum(part.bad_rows for part in parts),
            problems=list(islice(problems, self._cap)),
            total_problems=sum(part.total_problems for part in parts),
            counts=sum((part.counts for part in parts), Counter()),
            warnings=own.warnings,
            total_warnings=own.total_warnings,
        )

    def _odd(self, tally: Tally, shape: Format) -> Findings:
        rows = self._tallies[shape.name].rows
        reason = (
            f"is {tally.shape.described} although {rows} of {sum(self.formats.values())} rows are {shape.described}: "
            "use one format"
        )
        defect = Defect("mixed_formats", None, reason)
        return Findings(
            cap=self._cap,
            bad_rows=tally.rows,
            problems=[problem_of(number, defect) for number in tally.numbers],
            total_problems=tally.rows,
            counts=Counter({defect.code: tally.rows}),
        )

    def _lacking(self, shape: Format) -> Findings:
        """The rows without a telling column, by what they lack for the file's format."""
        problems: list[RowProblem] = []
        for number, known, columns in self._shapeless:
            reason = f"is missing: the row has {columns}" if columns else "is missing"
            lacking = [column for column in shape.columns if column not in known]
            problems += [problem_of(number, Defect("missing", column, reason)) for column in lacking]
        total = sum(len(set(shape.columns) - known) * rows for known, rows in self._shapeless_counts.items())
        return Findings(
            cap=self._cap,
            bad_rows=self._shapeless_counts.total(),
            problems=problems,
            total_problems=total,
            counts=Counter({"missing": total} if total else {}),
        )


def _row(problem: RowProblem) -> int:
    return problem.row
