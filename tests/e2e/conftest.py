"""The whole product once for all tests here: a real service and a real Llama Stack, with a tiny model."""

import pytest

from tests.bento_server import bento_server
from tests.stack_server import stack_server
from tests.tiny_model import make_tiny_model

MODEL = "org/tiny"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / MODEL)
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory, models):
    # One attempt: a test kills a trainer and wants to see the reason, not a retry.
    environment = {"TRL_MAX_ATTEMPTS": "1"}
    with bento_server(tmp_path_factory.mktemp("service"), models=models, environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def stack(tmp_path_factory, service):
    with stack_server(tmp_path_factory.mktemp("stack"), service.url) as server:
        yield server
