"""What tests share: databases (PostgreSQL where its server is installed; CI insists on it), signals, environment."""

import os
import signal
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog

from tests.postgresql_server import postgresql_server, server_programs

# As the service sets it up for a terminal: structlog's own tracebacks take seconds to draw.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

# The user's settings of the service (`make` sets where its models are) are not for the tests.
for name in [name for name in os.environ if name.startswith("TRL_")]:
    del os.environ[name]

# Of the tests and of the trainers that they start: threads on tiny tensors cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# tests/compat makes an environment for each release of Llama Stack, tests/container an image, and
# tests/deepspeed needs DeepSpeed: only by name.
BY_NAME = ("compat", "container", "deepspeed")


def pytest_ignore_collect(collection_path, config):
    name = collection_path.name
    if collection_path.parent != Path(__file__).parent or name not in BY_NAME:
        return None
    return None if any(f"tests/{name}" in argument for argument in config.invocation_params.args) else True


@pytest.fixture
def signals():
    """A trainer in this process takes over these signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def postgresql():
    programs = server_programs()
    if programs is None:
        assert not os.environ.get("CI"), "PostgreSQL's server is not installed: apt-get install postgresql"
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    with postgresql_server(programs) as url:
        yield url


@pytest.fixture
def postgresql_database(postgresql):
    """An empty database on the server."""
    name = f"test_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return sa.engine.make_url(postgresql).set(database=name).render_as_string()
