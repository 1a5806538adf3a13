"""What the documentation names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bento_service.settings import FOREIGN_VARIABLES, Settings

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_the_tests_that_hold_the_promises_exist(page):
    text = (REPOSITORY / "docs" / page).read_text()
    files = {path.name: path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py")}
    named_files = set(re.findall(r"\btest_\w+\.py\b", text))
    named_tests = set(re.findall(r"(?:::|`)(test_\w+)(?=[`\[])", text))
    assert len(named_files) > 5 and len(named_tests) > 15
    assert named_files <= set(files)
    every = "\n".join(files.values())
    assert [name for name in named_tests if f"def {name}(" not in every] == []
    assert [name for name in re.findall(r"::(Test\w+)", text) if f"class {name}:" not in every] == []


def test_every_setting_has_its_row():
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `(TRL_\w+)` \|", text, re.MULTILINE)
    assert set(rows) - FOREIGN_VARIABLES == {f"TRL_{name.upper()}" for name in Settings.model_fields}


def test_the_tables_of_the_api_and_its_options_are_current():
    checked = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "tables.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
