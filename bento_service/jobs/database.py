"""Opening the database: engine, SQLite's pragmas, migrations. Only ``store`` uses it."""

from pathlib import Path

import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy.engine import URL, Connection, Engine, make_url

# The revision that this code works with; tests hold it equal to the newest migration.
HEAD_REVISION = "0002"

MIGRATIONS = Path(__file__).parent / "migrations"

# A client that sleeps inside a transaction loses it, so that its locks do not outlive its lease. In milliseconds.
_POSTGRESQL_OPTIONS = "-c idle_in_transaction_session_timeout=10000"

# Any constant will do: it names the lock under which PostgreSQL runs migrations one at a time.
_MIGRATION_LOCK = 0x7472_6C72


def open_engine(url: str) -> Engine:
    """An engine on the migrated database.

    SQLite runs in WAL mode with ``synchronous=FULL``, so that a committed transaction survives power loss. Write
    transactions take the lock at their start (``BEGIN IMMEDIATE``): SQLite cannot upgrade a read transaction
    while another writes.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    # pydantic's reader of JSON is the quicker one, and every row has several columns of it.
    engine = sa.create_engine(
        parsed,
        pool_pre_ping=not sqlite,
        json_deserializer=from_json,
        connect_args={} if sqlite else {"options": _POSTGRESQL_OPTIONS},
    )
    if sqlite:
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    _migrate(engine)
    return engine


def read_connection(engine: Engine) -> Connection:
    """A connection whose transaction reads one snapshot and never waits for a writer."""
    return engine.connect().execution_options(reads_only=True)


def _configure_sqlite(connection, record) -> None:  # type: ignore[no-untyped-def]
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def _migrate(engine: Engine) -> None:
    if _revision(engine) == HEAD_REVISION:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD_REVISION)


def _revision(engine: Engine) -> str | None:
    with read_connection(engine) as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def safe_url(url: URL | str) -> str:
    """The URL with its password hidden, for logs."""
    return make_url(url).render_as_string(hide_password=True)
