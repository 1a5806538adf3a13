"""What a trainer reports: the events of a run, as lines of ``events.jsonl``.

A line is one JSON object: ``{"seq": 7, "time": 1767.25, "type": "metrics", "level": "info", "message": "...",
"data": {...}}``. ``seq`` counts from 1 over all attempts of the job; NaN and infinity are written as null.

Types and their data:
    progress    step, total_steps, epoch, tokens: when training starts, and after an evaluation before it
    metrics     step, total_steps, epoch, tokens and TRL's values under TRL's names (loss, learning_rate, grad_norm,
                rewards/margins, rewards/accuracies, ...); tokens_per_second, rows_per_second, padding_fraction,
                memory_peak_bytes and, where it is known, model_flops_utilization (see ``throughput``)
    evaluation  step, epoch and TRL's values with their eval_ prefix
    checkpoint  step, epoch, path, bytes, final
    message     nothing, or what the message is about; removed: path of a checkpoint that was deleted; best: step,
                metric and value of the best checkpoint so far
"""

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bento_service.errors import UnreadableRun

EventType = Literal["progress", "metrics", "evaluation", "checkpoint", "message", "state"]
EventLevel = Literal["info", "warn", "error"]


class TrainerEvent(BaseModel):
    """One line of events.jsonl."""

    model_config = ConfigDict(frozen=True)

    seq: int = Field(ge=1)
    time: float  # unix seconds
    type: EventType
    level: EventLevel = "info"
    message: str
    data: dict[str, Any] = {}


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None, so that it is valid JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class EventWriter:
    """Appends events to one run's file; continues the numbering of an earlier attempt.

    A torn last line, left by a kill, is cut off before the first new line is written.
    """

    def __init__(self, path: Path) -> None:
        self._seq = _repair(path)
        self._file = path.open("ab", buffering=0)

    def write(self, type: EventType, message: str, *, level: EventLevel = "info", **data: Any) -> TrainerEvent:
        event = TrainerEvent(
            seq=self._seq + 1, time=time.time(), type=type, level=level, message=message, data=finite(data)
        )
        # A disk that fills can take part of a line; the sequence number moves on only with the whole of it.
        line = event.model_dump_json().encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes of an event", self._file.name)
        self._seq = event.seq
        return event

    def close(self) -> None:
        self._file.close()


class MutedWriter(EventWriter):
    """The events of a rank that is not the first: the first one writes the same."""

    def __init__(self) -> None:
        self._seq = 0

    def write(self, type: EventType, message: str, *, level: EventLevel = "info", **data: Any) -> TrainerEvent:
        self._seq += 1
        return TrainerEvent(
            seq=self._seq, time=time.time(), type=type, level=level, message=message, data=finite(data)
        )

    def close(self) -> None:
        pass


def _repair(path: Path) -> int:
    """Cut a torn last line and return the last sequence number, 0 for a new file."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        os.truncate(path, end)
    lines = content[:end].splitlines()
    return int(json.loads(lines[-1])["seq"]) if lines else 0


def read_events(path: Path, offset: int = 0) -> tuple[list[TrainerEvent], int]:
    """Events in whole lines from a byte offset on, and the offset after the last whole line.

    Raises UnreadableRun when a line is no event.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(1 << 20)
        while content and b"\n" not in content and (more := file.read(1 << 20)):
            content += more
    end = content.rfind(b"\n") + 1
    try:
        events = [TrainerEvent.model_validate_json(line) for line in content[:end].split(b"\n")[:-1]]
    except ValueError as error:
        raise UnreadableRun(f"{path} cannot be read after byte {offset}: {error}") from error
    return events, offset + end
