"""Every operation keeps to the OpenAPI document: no 5xx, no undocumented status, no answer of another shape.

Schemathesis makes requests from the document, valid and invalid ones. What they name in their paths is there, so that
they come further than 404: of the valid ones, each operation has to carry out some.
"""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from bento_service.api.app import create_app, in_front_of
from bento_service.jobs.job import JobStatus
from bento_service.jobs.store import Store
from bento_service.preview_process import PreviewProcesses
from bento_service.training import checkpoints
from bento_service.training.events import TrainerEvent
from bento_service.training.manifest import Build, Hardware, RunManifest, RunMetrics
from bento_service.training.preferences import check_file
from bento_service.training.preview import Preview, run_of
from bento_service.training.run_directory import RunDirectory
from bento_service.training.token_statistics import TokenTally
from bento_service.training.tokenization import RowTokens
from tests.core_factory import MODEL, core, request, upload

EXAMPLES = 25
IMPORT = "/v1/files/import"
VALIDATE = "/v1/fine_tuning/jobs/validate"
MANIFEST = RunManifest(
    job_id="ftjob-1",
    created_at=1,
    method="dpo",
    base_model=MODEL,
    seed=1,
    settings={},
    datasets=[],
    versions={},
    build=Build(git_commit=None, bento=None),
    hardware=Hardware(machine="m", system="s", cpu_cores=1, memory_bytes=1, gpus=[], cuda=None),
    metrics=RunMetrics(step=2, tokens=64, training={"loss": 0.5}, evaluations=[]),
)


def preview_of(order):
    """The data really checked, and tokens as if each text had a few: a process and a tokenizer would take minutes."""
    report = check_file(Path(order.spec.training_file), method=order.spec.method, bounds=order.bounds)
    tally = TokenTally(order.spec.options.max_length, order.spec.batch_size)
    for _ in range(report.rows):
        tally.add(RowTokens(1, (5, 6)))
    tokens = tally.statistics(report.rows)
    run = run_of(order.spec, tokens, None)
    return Preview(training=report.to_json(), validation=None, refusals=[], tokens=tokens, run=run)


@pytest.fixture(scope="module", autouse=True)
def previews_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreviewProcesses, "run", lambda processes, order, cancelled: preview_of(order))
        yield


def trained(impl, file_id):
    """A job that has succeeded, with all that it leaves."""
    job = impl.submit(request(file_id, metadata={"k": "v"}))
    store = Store.open(impl.settings.sqlalchemy_url)
    claimed = store.claim("test", host="here", free_devices=1, lease_seconds=60)
    assert claimed.id == job.id
    lease = store.adopt(job.id, "test", lease_seconds=60, from_token=claimed.lease_token)
    run = RunDirectory(impl.settings.runs_path / job.id)
    folder = run.checkpoints / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    checkpoints.complete(folder, step=2, epoch=1.0, tokens=64, final=True)
    run.manifest_file.write_text(MANIFEST.model_dump_json())
    saved = {"step": 2, "epoch": 1.0, "path": str(folder), "bytes": 7, "final": True}
    reached = {"step": 2, "total_steps": 2, "epoch": 1.0, "tokens": 64, "loss": 0.5}
    reports = [("metrics", reached), ("checkpoint", saved)]
    events = [
        TrainerEvent(seq=number, time=1700000000.5, type=type, message="", data=data)
        for number, (type, data) in enumerate(reports, start=1)
    ]
    store.record(lease, events, offset=1)
    store.finish(lease, JobStatus.SUCCEEDED, "Training finished")
    store.close()
    return job


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """The core object with a job that has succeeded, and the path parameters that lead to all that is of it.

    And a trained model to delete, made before jobs are submitted that nothing trains.
    """
    with core(tmp_path_factory.mktemp("service"), allow_anonymous=True, max_file_bytes=100_000) as impl:
        file = upload(impl)
        job, other = trained(impl, file.id), trained(impl, file.id)
        known = {"job_id": job.id, "file_id": file.id, "step": 2, "model": MODEL, "name": "adapter_model.safetensors"}
        yield impl, known | {"trained_model": other.fine_tuned_model}


@pytest.fixture(scope="module")
def document(seeded):
    impl, _ = seeded
    return schemathesis.openapi.from_asgi("/openapi.json", in_front_of(create_app(impl), impl.settings))


def operations():
    """Method, path and kind of request, from the document; without parameters and a body none can be invalid."""
    for path, item in create_app().openapi()["paths"].items():
        for method, operation in item.items():
            yield pytest.param(method, path, GenerationMode.POSITIVE, id=f"{method}-{path}-valid")
            if "parameters" in operation or "requestBody" in operation:
                yield pytest.param(method, path, GenerationMode.NEGATIVE, id=f"{method}-{path}-invalid")


def usable(impl, method, path, known):
    """Path parameters of a job, file or model in the state that the operation needs."""
    if method == "delete":
        return {"file_id": upload(impl).id, "model": known["trained_model"]}
    if path.endswith(("/cancel", "/pause", "/resume")):
        job_id = impl.submit(request(known["file_id"])).id
        if path.endswith("/resume"):
            impl.pause(job_id)
        return {"job_id": job_id}
    return {}


@pytest.mark.parametrize(("method", "path", "mode"), list(operations()))
def test_operations_keep_to_the_document(seeded, document, method, path, mode):
    impl, known = seeded
    operation = document[path][method]
    values = known | usable(impl, method, path, known)
    fixed = {parameter.name: values[parameter.name] for parameter in operation.path_parameters}
    if mode is GenerationMode.NEGATIVE and not [*operation.query, *operation.body]:
        fixed = {}  # by its path then, which leads nowhere
    # A valid request to validate starts a process that imports a tokenizer.
    examples = 1 if path == VALIDATE and mode is GenerationMode.POSITIVE else EXAMPLES
    answered = set()

    @seed(1)
    # Requests that fail are not made smaller: there is a curl command for each, and most are short.
    @settings(
        phases=[Phase.generate],
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=fixed or None))
    def check(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "training_file" in case.body:
            case.body |= {"model": MODEL, "training_file": known["file_id"]}
        # A request may be valid for the document and still name what there is not, or contradict itself.
        answered.add(case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120).status_code)

    check()
    if mode is GenerationMode.POSITIVE:
        # No URL may be imported from where the operator has named none.
        assert 200 in answered or (path == IMPORT and answered == {400, 403}), answered
