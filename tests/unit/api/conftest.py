"""The HTTP API in this process, as a caller on this host meets it: on a real store, with nothing to run its jobs."""

import pytest
from starlette.testclient import TestClient

from bento_service.api.app import create_app, in_front_of
from tests.core_factory import core


@pytest.fixture
def impl(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with core(tmp_path, max_file_bytes=100_000) as impl:
        yield impl


@pytest.fixture
def client(impl):
    app = in_front_of(create_app(impl), impl.settings)
    with TestClient(app, base_url="http://localhost:8080", client=("127.0.0.1", 50000)) as client:
        yield client
