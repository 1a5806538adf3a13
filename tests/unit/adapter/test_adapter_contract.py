"""The adapter against the service's own HTTP app and core object: what one sends, the other takes."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from llama_stack_provider_trl_remote.adapter import TrlRemoteAdapter
from llama_stack_provider_trl_remote.config import TrlRemoteConfig
from llama_stack_provider_trl_remote.errors import Conflict, NotFound, RequestRefused, ServiceUnavailable
from llama_stack_provider_trl_remote.protocol import JobRequest

from bento_service.api.app import create_app, in_front_of
from bento_service.post_training import TrlPostTrainingImpl
from bento_service.settings import Settings
from tests.core_factory import MODEL, core
from tests.unit.adapter.stack_fakes import PAIRS, FakeDatasets, dpo_request

EVERYTHING = {
    "n_epochs": 3,
    "max_steps_per_epoch": 9,
    "gradient_accumulation_steps": 2,
    "max_validation_steps": 5,
    "dtype": "fp32",
    "optimizer_config": {"optimizer_type": "adamw", "lr": 1e-5, "weight_decay": 0.1, "num_warmup_steps": 7},
    "efficiency_config": {"enable_activation_checkpointing": True},
}


@pytest.fixture
def impl(tmp_path: Path) -> Iterator[TrlPostTrainingImpl]:
    with core(tmp_path) as impl:
        yield impl


def adapter(impl: TrlPostTrainingImpl, *, api_keys: str = "", **config: Any) -> TrlRemoteAdapter:
    app = in_front_of(create_app(impl), Settings(home=impl.settings.home, api_keys=api_keys))
    bad: list[dict[str, Any]] = [*PAIRS, {"prompt": "p", "chosen": "c"}]
    stack = FakeDatasets(pairs=PAIRS, held_out=PAIRS[:2], bad=bad)
    transport = httpx.ASGITransport(app)
    return TrlRemoteAdapter(TrlRemoteConfig(**config), datasets=stack, datasetio=stack, transport=transport)


def submit(adapter: TrlRemoteAdapter, *args: Any, model: str = MODEL, **changes: Any) -> str:
    request = dpo_request(*args, **changes).model_copy(update={"finetuned_model": model})
    return str(asyncio.run(adapter.preference_optimize(request)).job_uuid)


def test_a_job_is_made_as_asked_and_found_again(impl: TrlPostTrainingImpl) -> None:
    stack = adapter(impl, training_config={"device": "cpu"})
    job_uuid = "team/run 1?"
    extras = {"seed": 5, "suffix": "mine", "dpo": {"label_smoothing": 0.1}}
    changes = {"training": EVERYTHING, "data": {"validation_dataset_id": "held_out"}, "extras": extras}
    assert submit(stack, job_uuid, **changes) == job_uuid
    assert submit(stack, job_uuid, **changes) == job_uuid

    (job,) = impl.list_jobs().data
    assert (job.client_id, job.spec.beta, job.spec.n_epochs, job.spec.seed) == (job_uuid, 0.1, 3, 5)
    assert job.spec.learning_rate == 1e-5
    assert job.spec.options.max_steps_per_epoch == 9
    assert job.spec.options.dpo.label_smoothing == 0.1
    assert len(Path(job.spec.training_file).read_bytes().splitlines()) == len(PAIRS)
    assert len(impl.list_files().data) == 2

    async def look() -> None:
        shown = await stack.get_training_job_status(JobRequest(job_uuid=job_uuid))
        assert (shown.job_uuid, shown.status.value) == (job_uuid, "scheduled")
        assert shown.resources_allocated["service_job_id"] == job.id
        await stack.cancel_training_job(JobRequest(job_uuid=job_uuid))
        by_service_id = await stack.get_training_job_status(JobRequest(job_uuid=job.id))
        assert by_service_id.status.value == "cancelled"
        artifacts = await stack.get_training_job_artifacts(JobRequest(job_uuid=job_uuid))
        assert artifacts.checkpoints == []
        with pytest.raises(NotFound):
            await stack.get_training_job_status(JobRequest(job_uuid="ftjob-unknown"))

    asyncio.run(look())


def test_more_jobs_than_a_page_are_listed(impl: TrlPostTrainingImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_stack_provider_trl_remote.client.PAGE", 2)
    stack = adapter(impl)
    names = [submit(stack, f"job-{i}") for i in range(5)]
    assert [job.job_uuid for job in asyncio.run(stack.get_training_jobs()).data] == names[::-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "org/unknown"}, "org/unknown"),
        ({"data": {"dataset_id": "bad"}}, "rejected"),
        ({"extras": {"max_lenght": 5}}, "max_lenght"),
        ({"extras": {"dpo": {"loss_type": ["exo_pair"]}}}, "label_smoothing"),
        ({"logger": {"logging_steps": 0}}, "logging.steps"),
    ],
)
def test_refusals_reach_the_caller_and_leave_nothing(
    impl: TrlPostTrainingImpl, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestRefused, match=named):
        submit(adapter(impl), **changes)
    assert impl.list_jobs().data == []
    assert impl.list_files().data == []


def test_a_taken_job_uuid(impl: TrlPostTrainingImpl) -> None:
    stack = adapter(impl)
    submit(stack)
    with pytest.raises(Conflict, match="use a new job_uuid"):
        submit(stack, algorithm={"beta": 0.5})
    assert len(impl.list_files().data) == 1


def test_keys(impl: TrlPostTrainingImpl) -> None:
    assert submit(adapter(impl, api_keys="a-key", api_key="a-key")) == "job-1"
    with pytest.raises(ServiceUnavailable, match=r"refused the adapter's api_key \(401\)"):
        submit(adapter(impl, api_keys="a-key", api_key="another"))
