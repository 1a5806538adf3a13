"""The model card of a checkpoint says what was trained, and nothing of whose job it was."""

import pytest

from bento_service.training import model_card
from bento_service.training.manifest import Build, Hardware, RunManifest, RunMetrics
from tests.job_factory import make_job


def manifest_of(options):
    spec = make_job(options=options).spec
    return RunManifest(
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


def test_settings_are_without_the_ids_of_the_job():
    manifest = manifest_of({"client_id": "my-own-id", "max_length": 77})
    card = model_card.write(manifest)
    assert '"max_length": 77' in card
    assert manifest.job_id not in card
    assert "client_id" not in card and "my-own-id" not in card
    assert manifest.settings["options"]["client_id"] == "my-own-id"  # the manifest keeps them


@pytest.mark.parametrize(
    ("quantization", "says"), [("nf4", "load_in_4bit=True"), ("int8", "load_in_8bit=True"), (None, None)]
)
def test_the_base_model_is_loaded_as_it_was_trained_on(quantization, says):
    card = model_card.write(manifest_of({"lora": {"quantization": quantization}}))
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert ("quantization_config=quantization" in code) == (says is not None)
    assert says is None or says in code
