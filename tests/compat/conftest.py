"""One server of each release, in turn; two training services for all of them; the table of what was seen.

``make test-compat`` runs it. ``--release 0.6.1`` (more than once for several) runs fewer, and writes no table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bento_server import BentoServer, bento_server
from tests.compat.environments import adapter_wheel, environment
from tests.compat.releases import RELEASES, Release
from tests.compat.stack import MODEL, Stack, dpo, sft
from tests.compat.switch import Switch
from tests.compat.table import Table
from tests.fake_training_service import FakeTrainingService
from tests.stack_server import REPOSITORY, stack_server
from tests.tiny_model import make_tiny_model
from tests.trainer_run import preference_rows

START_SECONDS = 300
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(4)
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", action="append", help="A release to test; all when left out.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(config, REPOSITORY / "docs" / "compatibility.md"), "compatibility-table")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--release") or [release.name for release in RELEASES]
        if unknown := set(wanted) - {release.name for release in RELEASES}:
            raise pytest.UsageError(f"no such release: {', '.join(unknown)}")
        chosen = [release for release in RELEASES if release.name in wanted]
        metafunc.parametrize("release", chosen, ids=str, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of one release, then all of the next: each has one server at a time."""
    order = {release: number for number, release in enumerate(RELEASES)}
    items.sort(key=lambda item: order[item.callspec.params["release"]])  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def python(release: Release, wheel: Path) -> Path:
    return environment(release, wheel)


@pytest.fixture(scope="session")
def switch() -> Iterator[Switch]:
    with Switch().running() as switch:
        yield switch


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BentoServer]:
    """The real one, with a tiny model. One slot: a second job waits."""
    models = tmp_path_factory.mktemp("models")
    make_tiny_model(models / MODEL)
    with bento_server(tmp_path_factory.mktemp("service"), models=models, ready_seconds=START_SECONDS) as server:
        yield server


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeTrainingService, str]]:
    fake = FakeTrainingService()
    with fake.serve() as url:
        yield fake, url


@pytest.fixture(scope="session")
def server(
    release: Release, python: Path, switch: Switch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Started while the service is down: it must start all the same."""
    switch.to(None)
    home = tmp_path_factory.mktemp(f"stack-{release}")
    with stack_server(
        home,
        switch.url,
        config=REPOSITORY / release.config,
        python=str(python),
        serve=release.serve,
        start_seconds=START_SECONDS,
    ) as process:
        yield Stack(release, process, switch, python)


@pytest.fixture
def fake(fakes: tuple[FakeTrainingService, str], server: Stack) -> FakeTrainingService:
    """What the release's server talks to in this test: it keeps what was asked of it."""
    service, url = fakes
    server.switch.to(url)
    return service


@pytest.fixture
def stack(server: Stack, service: BentoServer) -> Stack:
    """The release's server in front of the real service."""
    server.switch.to(service.url)
    return server


@pytest.fixture(scope="session")
def files(server: Stack, service: BentoServer) -> dict[str, str]:
    """Dataset ids; for a release without datasets, ids of files at the service."""
    server.switch.to(service.url)
    return {"pairs": given(server, service.url, preference_rows(4)), "chats": given(server, service.url, CHATS)}


@pytest.fixture(scope="session")
def submitted(release: Release, server: Stack, files: dict[str, str]) -> dict[str, str]:
    """A DPO and an SFT job that train while other cases are looked at."""
    pairs = dpo(files["pairs"], None, release)
    pairs["training_config"]["data_config"]["validation_dataset_id"] = files["pairs"]
    jobs = {}
    for name, call, body in (
        ("dpo", "preference-optimize", pairs),
        ("sft", "supervised-fine-tune", sft(files["chats"])),
    ):
        answer = server.post(call, body)
        assert answer.status_code == 200, answer.text
        jobs[name] = answer.json()["job_uuid"]
    return jobs


def given(server: Stack, service_url: str, rows: list[dict[str, Any]]) -> str:
    if server.release.datasets is not None:
        return server.register({"type": "rows", "rows": rows})
    return server.upload(service_url, rows)
