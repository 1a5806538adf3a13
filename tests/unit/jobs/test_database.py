"""Migrations lead to exactly the schema that the code uses."""

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from bento_service.jobs import schema
from bento_service.jobs.database import HEAD_REVISION, MIGRATIONS, open_engine, safe_url


def test_the_newest_migration_is_the_one_the_code_asks_for():
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == HEAD_REVISION


def test_migrations_lead_to_the_schema(database_url):
    engine = open_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_sqlite_is_durable_and_lets_readers_and_a_writer_in(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path / 'trl.db'}")
    with engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2  # FULL
        assert connection.execute(sa.text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()


def test_passwords_do_not_show():
    assert "secret" not in safe_url("postgresql://me:secret@host/db")
