"""Python code that a model brings along runs for models that the operator named, and for no others."""

import json

import pytest
from pydantic import ValidationError

from bento_service.errors import UnknownModel
from bento_service.jobs.devices import Devices
from bento_service.jobs.store import Store
from bento_service.jobs.supervisor import Supervisor
from bento_service.settings import Settings
from bento_service.training.models import load_model, load_tokenizer
from tests.core_factory import MODEL, upload
from tests.job_factory import submit
from tests.tiny_model import make_tiny_model

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model whose class is in its folder, and the file that this code makes when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = make_tiny_model(tmp_path / "org" / "own"), tmp_path / "code-ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def test_a_models_own_code_is_not_run(own_code):
    """The job fails with what the operator can do; the code has not run."""
    folder, marker = own_code
    with pytest.raises(UnknownModel, match="TRL_TRUST_REMOTE_CODE_MODELS"):
        load_model("org/own", folder)
    load_tokenizer("org/own", folder, conversational=False)
    assert not marker.exists()


def test_it_is_run_where_the_operator_trusts_it(own_code):
    folder, marker = own_code
    assert type(load_model("org/own", folder, trust_remote_code=True)).__name__ == "OwnModel"
    assert marker.exists()


def test_pickled_weights_are_not_read(tmp_path):
    """Weights are safetensors: a pickle may run anything when it is read."""
    import torch

    folder = make_tiny_model(tmp_path / "org" / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnknownModel):
        load_model("org/pickled", folder, trust_remote_code=True)


@pytest.mark.parametrize(
    "trl", [{"trust_remote_code": True}, {"model": {"trust_remote_code": True}}, {"use_safetensors": False}]
)
def test_a_request_cannot_ask_for_it(client, impl, trl):
    """There is no such option, at any place of a request."""
    body = {"model": MODEL, "training_file": upload(impl).id}
    assert client.post("/v1/fine_tuning/jobs", json=body | {"trl": trl}).status_code == 400
    assert client.post("/v1/fine_tuning/jobs", json=body | trl).status_code == 400


@pytest.mark.parametrize(("setting", "trusted"), [("", False), ("org/tiny-2", False), ("other/own, org/tiny", True)])
def test_the_operator_decides_at_each_launch(tmp_path, setting, trusted):
    """A name, whole; and what was permitted once is taken back with the setting."""
    settings = Settings(home=tmp_path, trust_remote_code_models=setting, trainer_command="true")
    store = Store.open(settings.sqlalchemy_url)
    job = submit(store, model="org/tiny")
    supervisor = Supervisor(settings, store, devices=Devices("cpu", ("0",)))
    try:
        supervisor.step()
        spec = json.loads((settings.runs_path / job.id / "spec.json").read_text())
    finally:
        for run in supervisor.runs.values():
            run.trainer.kill()
            run.trainer._process.wait()
        store.close()
    assert spec["trust_remote_code"] is trusted


@pytest.mark.parametrize("setting", ["*", "org/*", "https://huggingface.co/org/name", "a b"])
def test_there_is_no_pattern_for_every_model(setting):
    with pytest.raises(ValidationError):
        Settings(trust_remote_code_models=setting)
