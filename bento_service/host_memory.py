"""The host's memory, or, in a container, what its control group may use of it."""

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _ControlGroup:
    """Where a control group tells its memory, as a container sees its own."""

    limit: Path
    usage: Path
    statistics: Path
    cache: str  # the line of ``statistics`` with what it can give up at once: pages of files not used lately


_GROUPS = (
    _ControlGroup(
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
        Path("/sys/fs/cgroup/memory.stat"),
        "inactive_file",
    ),
    _ControlGroup(  # version 1
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
        "total_inactive_file",
    ),
)


def total() -> int:
    """Bytes that all processes may take together."""
    return min([psutil.virtual_memory().total, *(_limit(group) for group in _limiting())])


def available() -> int:
    """Bytes that can still be taken."""
    free = [psutil.virtual_memory().available]
    for group in _limiting():
        if not (group.usage.is_file() and group.statistics.is_file()):
            continue  # a sandbox that tells the limit only
        statistics = dict(line.split(maxsplit=1) for line in group.statistics.read_text().splitlines())
        used = int(group.usage.read_text()) - int(statistics.get(group.cache, "0"))
        free.append(max(0, _limit(group) - used))
    return min(free)


def _limiting() -> list[_ControlGroup]:
    return [group for group in _GROUPS if group.limit.is_file() and group.limit.read_text().strip() != "max"]


def _limit(group: _ControlGroup) -> int:
    return int(group.limit.read_text())
