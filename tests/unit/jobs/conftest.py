"""The store on both databases: SQLite always, PostgreSQL where its server is installed (CI insists on it)."""

import os
import uuid

import pytest
import sqlalchemy as sa

from bento_service.jobs.store import Store
from tests.postgresql_server import postgresql_server, server_programs


@pytest.fixture(scope="session")
def postgresql():
    programs = server_programs()
    if programs is None:
        assert not os.environ.get("CI"), "PostgreSQL's server is not installed: apt-get install postgresql"
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    with postgresql_server(programs) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'trl.db'}"
    server = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return sa.engine.make_url(server).set(database=name).render_as_string()


@pytest.fixture
def store(database_url):
    store = Store.open(database_url)
    yield store
    store.close()
