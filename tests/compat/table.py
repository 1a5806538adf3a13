"""The table release x case: printed at the end of a run and kept in docs/compatibility.md.

A run of some releases (``--release``) renews their columns; a run of some cases (``-k``) is only printed.
"""

from pathlib import Path

import pytest

from tests.compat.releases import RELEASES

BEGIN, END = "<!-- table: made by make test-compat -->\n", "<!-- end of the table -->\n"
MARKS = {"passed": "yes", "failed": "NO", "skipped": "-"}


class Table:
    def __init__(self, config: pytest.Config, document: Path) -> None:
        self._config = config
        self._document = document
        self._cases: dict[str, dict[str, str]] = {}  # case -> release -> outcome

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):  # type: ignore[no-untyped-def]
        report = yield
        if report.when == "call" or report.outcome != "passed":
            case = str(item.function.__doc__).strip().partition("\n")[0].rstrip(".")  # type: ignore[attr-defined]
            release = item.callspec.params["release"].name  # type: ignore[attr-defined]
            outcomes = self._cases.setdefault(case, {})
            if outcomes.get(release) != "NO":
                outcomes[release] = MARKS[report.outcome]
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        if not self._cases:
            return
        terminalreporter.section("Llama Stack releases")
        for line in self._lines():
            terminalreporter.write_line(line)
        if not self._config.option.keyword and not any("::" in argument for argument in self._config.args):
            self._write()

    def _lines(self) -> list[str]:
        names = [release.name for release in RELEASES]
        tested = [name for name in names if any(name in outcomes for outcomes in self._cases.values())]
        width = max(map(len, self._cases))
        rows = [["", *tested], ["-" * width, *("-" * len(name) for name in tested)]]
        rows += [[case, *(outcomes.get(name, "") for name in tested)] for case, outcomes in self._cases.items()]
        widths = [width, *map(len, tested)]
        return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]

    def _write(self) -> None:
        before, begin, rest = self._document.read_text().partition(BEGIN)
        table, end, after = rest.partition(END)
        assert begin and end, f"{self._document} has no place for the table"
        for case, outcomes in _read(table).items():
            if case in self._cases:
                self._cases[case] = outcomes | self._cases[case]
        lines = "".join(f"{line}\n" for line in self._lines())
        self._document.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}")


def _read(table: str) -> dict[str, dict[str, str]]:
    """What earlier runs saw."""
    lines = [line.removeprefix("|").removesuffix("|") for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    if not rows:
        return {}
    names = rows[0][1:]
    return {case: dict(zip(names, outcomes, strict=True)) for case, *outcomes in rows[2:]}
