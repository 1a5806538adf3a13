"""The model card of a checkpoint says what was trained, and nothing of whose job it was."""

from bento_service.training import model_card
from bento_service.training.manifest import Build, Hardware, RunManifest, RunMetrics
from tests.job_factory import make_job


def test_settings_are_without_the_ids_of_the_job():
    spec = make_job(options={"client_id": "my-own-id", "max_length": 77}).spec
    manifest = RunManifest(
        job_id=spec.job_id,
        created_at=1,
        method=spec.method,
        base_model=spec.model,
        seed=spec.seed,
        settings=spec.model_dump(mode="json"),
        datasets=[],
        versions={},
        build=Build(git_commit=None, bento=None),
        hardware=Hardware(machine="m", system="s", cpu_cores=1, memory_bytes=1, gpus=[], cuda=None),
        metrics=RunMetrics(step=2, tokens=64, training={"loss": 0.5}, evaluations=[]),
    )
    card = model_card.write(manifest)
    assert '"max_length": 77' in card
    assert spec.job_id not in card
    assert "client_id" not in card and "my-own-id" not in card
    assert manifest.settings["options"]["client_id"] == "my-own-id"  # the manifest keeps them
