"""What the documentation names exists."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_tests_that_hold_the_promises_exist():
    text = (REPOSITORY / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py")}
    named_files = set(re.findall(r"\btest_\w+\.py\b", text))
    named_tests = set(re.findall(r"(?:::|`)(test_\w+)(?=[`\[])", text))
    assert len(named_files) > 8 and len(named_tests) > 15
    assert named_files <= set(files)
    every = "\n".join(files.values())
    assert [name for name in named_tests if f"def {name}(" not in every] == []


def test_the_tables_of_the_api_and_its_options_are_current():
    checked = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "tables.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
