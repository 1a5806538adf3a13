"""The store on both databases."""

import pytest

from bento_service.jobs.store import Store


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'trl.db'}"
    return request.getfixturevalue("postgresql_database")


@pytest.fixture
def store(database_url):
    store = Store.open(database_url)
    yield store
    store.close()
