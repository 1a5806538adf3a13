"""The statements that are executed often, built once: for SQLAlchemy, building one costs more than SQLite's answer."""

from typing import Any

import sqlalchemy as sa

from bento_service.jobs.job import JobStatus
from bento_service.jobs.schema import events, jobs

# Parameter: job_id.
JOB = sa.select(jobs).where(jobs.c.id == sa.bindparam("job_id"))

# Status and newest event number, without reading the rest of the job. Parameter: job_id.
STATE = sa.select(jobs.c.status, jobs.c.event_seq).where(jobs.c.id == sa.bindparam("job_id"))

# Parameters: job_id, seq, limit.
EVENTS_AFTER = (
    sa.select(events)
    .where(events.c.job_id == sa.bindparam("job_id"), events.c.seq > sa.bindparam("seq"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)

RUNNING = sa.select(jobs.c.devices, jobs.c.started_at, jobs.c.progress).where(jobs.c.status == JobStatus.RUNNING.value)

# Parameter: limit. Jobs of every kind of end: with a condition on it SQLite would read all that ended.
LAST_ENDED = (
    sa.select(jobs.c.status, jobs.c.started_at, jobs.c.finished_at)
    .where(jobs.c.finished_at.is_not(None))
    .order_by(jobs.c.finished_at.desc())
    .limit(sa.bindparam("limit", type_=sa.Integer))
)


def _queued(*before: sa.ColumnElement[bool]) -> sa.Select[Any]:
    sums = sa.func.count(), sa.func.coalesce(sa.func.sum(jobs.c.devices), 0)
    return sa.select(*sums).where(jobs.c.status == JobStatus.QUEUED.value, *before)


# Two rows that add up to the jobs before one in the queue and the devices they ask for, from the index alone. Two
# ranges of it: an OR of them would be one scan over the whole queue. Parameters: priority, number.
AHEAD = sa.union_all(
    _queued(jobs.c.priority > sa.bindparam("priority")),
    _queued(jobs.c.priority == sa.bindparam("priority"), jobs.c.number < sa.bindparam("number")),
)
