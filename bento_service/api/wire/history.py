"""What happened to a job: its events, its attempts and its log."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from bento_service.api.wire.base import seconds
from bento_service.jobs.job import Attempt, JobEvent
from bento_service.jobs.log_page import LogPage


class EventObject(BaseModel):
    """One entry of a job's history."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] = Field(
        description="The event's values. `type` is one of state, message, progress, metrics, evaluation, checkpoint; "
        "`seq` counts the job's events from 1."
    )

    @classmethod
    def of(cls, event: JobEvent) -> "EventObject":
        return cls(
            id=event.id,
            created_at=int(event.created_at),
            level=event.level,
            message=event.message,
            type="metrics" if event.type in ("metrics", "evaluation") else "message",
            data={**event.data, "type": event.type, "seq": event.seq},
        )


class AttemptObject(BaseModel):
    """One launch of a job's trainer."""

    object: Literal["fine_tuning.job.attempt"] = "fine_tuning.job.attempt"
    number: int = Field(description="From 1.")
    host: str
    devices: list[str] = Field(description="GPU indices or UUIDs; slot numbers on a host without GPUs.")
    pid: int | None = Field(description="Null until the process is up.")
    started_at: int
    ended_at: int | None
    exit_code: int | None = Field(description="Null for a process that a signal ended, or whose end nobody saw.")
    signal: int | None = Field(description="The signal that ended the process.")
    reason: str | None = Field(description="What the end meant for the job.")

    @classmethod
    def of(cls, attempt: Attempt) -> "AttemptObject":
        return cls(
            number=attempt.number,
            host=attempt.host,
            devices=attempt.devices,
            pid=attempt.pid,
            started_at=int(attempt.started_at),
            ended_at=seconds(attempt.ended_at),
            exit_code=attempt.exit_code,
            signal=attempt.signal,
            reason=attempt.reason,
        )


class LogObject(BaseModel):
    """A piece of the trainer's log: the output of all attempts, rotated by size."""

    object: Literal["fine_tuning.job.log"] = "fine_tuning.job.log"
    offset: int = Field(description="Byte at which the content starts.")
    next_offset: int = Field(description="The `offset` of the next piece.")
    size: int = Field(description="Bytes of the log now.")
    truncated: bool = Field(
        description="The offset asked for was past the end: the log was rotated; this starts at 0."
    )
    content: str = Field(description="Text; bytes that are no UTF-8 are U+FFFD.")

    @classmethod
    def of(cls, page: LogPage) -> "LogObject":
        return cls(
            offset=page.offset,
            next_offset=page.next_offset,
            size=page.size,
            truncated=page.truncated,
            content=page.content,
        )
