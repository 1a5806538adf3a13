"""What a process may take of memory: the host's, or less where a control group says so."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bento_service import host_memory

GB = 10**9


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    group = host_memory._ControlGroup(
        tmp_path / "limit", tmp_path / "usage", tmp_path / "statistics", cache="inactive_file"
    )
    monkeypatch.setattr(host_memory, "_GROUPS", (group,))
    group.usage.write_text(f"{5 * GB}\n")
    group.statistics.write_text(f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file 17\n")
    return tmp_path


def test_a_container_has_its_limit_less_what_cannot_be_given_up(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (group / "limit").write_text(f"{8 * GB}\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=64 * GB))
    assert host_memory.total() == 8 * GB
    assert host_memory.available() == 6 * GB
    (group / "limit").write_text(f"{GB}\n")
    assert host_memory.available() == 0
    (group / "usage").unlink()
    assert host_memory.available() == 64 * GB


@pytest.mark.parametrize("limit", ["max\n", f"{2**62}\n", None])
def test_without_a_limit_it_is_the_hosts(group: Path, limit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit is not None:
        (group / "limit").write_text(limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=7 * GB, available=7 * GB))
    assert host_memory.total() == host_memory.available() == 7 * GB


def test_this_host_tells() -> None:
    assert 0 < host_memory.available() <= host_memory.total() <= psutil.virtual_memory().total
