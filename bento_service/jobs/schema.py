"""The tables, as SQLAlchemy sees them. Their history is in ``migrations``; all queries are in ``store``."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

# SQLite numbers rows by itself only in a column of exactly INTEGER.
_RowNumber = BigInteger().with_variant(Integer, "sqlite")

files = Table(
    "files",
    metadata,
    Column("number", _RowNumber, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("created_at", Float(53), nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", _RowNumber, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("client_id", String(256), unique=True),
    Column("digest", String(64), nullable=False),  # of the request, to tell a repeat from a conflict
    Column("request", JSON, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("training_file", String(64), nullable=False, index=True),
    Column("validation_file", String(64), index=True),
    Column("fine_tuned_model", Text),
    Column("status", String(32), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("devices", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("queued_at", Float(53)),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("progress", JSON, nullable=False),
    Column("error", JSON),
    Column("wanted", String(16)),  # cancel or pause, until it is carried out
    Column("attempt", Integer, nullable=False, default=0),
    Column("failures", Integer, nullable=False, default=0),  # attempts that ended by an infrastructure cause
    Column("not_before", Float(53), nullable=False, default=0.0),  # back-off: not claimed earlier
    Column("lease_token", Integer, nullable=False, default=0),
    Column("lease_owner", String(256)),
    Column("lease_expires_at", Float(53)),
    Column("artifacts_expired", Boolean, nullable=False, default=False),
    Column("event_seq", Integer, nullable=False, default=0),  # seq of the newest event
    Column("submitted_by", String(64)),  # name of the API key; None without keys
    Column("event_offset", BigInteger, nullable=False, default=0),  # bytes of events.jsonl already carried over
    # devices: the queue's length is summed up from the index alone, without reading the jobs.
    Index("jobs_queue", "status", "priority", "number", "devices"),
    Index("jobs_finished", "finished_at"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("created_at", Float(53), nullable=False),
    Column("type", String(32), nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("epoch", Float(53), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("path", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("final", Boolean, nullable=False),
    Column("metrics", JSON, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("host", String(256), nullable=False),
    Column("devices", JSON, nullable=False),  # ids as in jobs.devices.Devices; empty until it is launched
    Column("pid", Integer),  # None until the process is up
    Column("pid_created_at", Float(53)),  # a pid is reused, a pid with its creation time is not
    Column("started_at", Float(53), nullable=False),
    Column("ended_at", Float(53)),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("reason", Text),
)
