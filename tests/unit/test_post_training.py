"""The core object: what it accepts, what it refuses at once, and what it makes of a request."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
from safetensors.numpy import save_file

from bento_service.admission import AUTO_BATCH_SIZE, AUTO_BETAS, AUTO_EPOCHS, AUTO_SEED
from bento_service.errors import (
    ClientIdConflict,
    Conflict,
    InvalidDataset,
    InvalidRequest,
    NotFound,
    ResourcesExceeded,
    TransitionRefused,
    UnknownModel,
)
from bento_service.jobs.job import JobStatus
from tests.core_factory import MODEL, PAIRS, core, request, upload


@pytest.fixture
def impl(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with core(tmp_path) as impl:
        yield impl


@pytest.fixture
def file_id(impl):
    return upload(impl).id


def test_auto_is_replaced_by_the_documented_defaults(impl, file_id):
    job = impl.submit(request(file_id))
    spec = job.spec
    assert (spec.beta, spec.batch_size, spec.n_epochs, spec.seed) == (
        AUTO_BETAS["dpo"],
        AUTO_BATCH_SIZE,
        AUTO_EPOCHS,
        AUTO_SEED,
    )
    assert spec.learning_rate == 1e-5
    assert spec.model_path == str(impl.settings.models_path / MODEL)
    assert spec.training_file == str(impl.file_content(file_id).path)
    assert (job.status, job.queue_position, spec.job_id) == (JobStatus.QUEUED, 1, job.id)


@pytest.mark.parametrize(
    ("changes", "options", "rate"),
    [
        ({}, {"tuning": "full"}, 1e-6),
        ({"learning_rate_multiplier": 3.0}, {}, 3e-5),
        ({}, {"optimizer": {"learning_rate": 2e-4}}, 2e-4),
    ],
)
def test_learning_rate_is_the_given_one_or_the_default_times_the_multiplier(impl, file_id, changes, options, rate):
    assert impl.submit(request(file_id, options=options, **changes)).spec.learning_rate == pytest.approx(rate)


def test_each_method_has_its_own_defaults(impl):
    conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    chat = upload(impl, [conversation]).id
    spec = impl.submit(request(chat, method="supervised")).spec
    assert (spec.method, spec.beta, spec.learning_rate) == ("supervised", None, 2e-4)
    spec = impl.submit(request(chat, method="supervised", options={"tuning": "full"})).spec
    assert spec.learning_rate == 2e-5
    unpaired = upload(impl, [{"prompt": "Hi", "completion": "Hello.", "label": True}]).id
    spec = impl.submit(request(unpaired, method="kto")).spec
    assert (spec.method, spec.beta, spec.learning_rate) == ("kto", 0.1, 1e-5)
    pairs = upload(impl).id
    spec = impl.submit(request(pairs, method="reward")).spec
    assert (spec.method, spec.beta, spec.learning_rate) == ("reward", None, 1e-4)
    assert impl.submit(request(pairs, method="reward", options={"tuning": "full"})).spec.learning_rate == 1e-5
    with pytest.raises(InvalidRequest, match="batch_size of 2 or more"):
        impl.submit(request(unpaired, method="kto", batch_size=1))


@pytest.mark.parametrize(
    ("method", "options", "param"),
    [("dpo", {"sft": {"packing": True}}, "trl.sft"), ("supervised", {"dpo": {"loss_type": ["ipo"]}}, "trl.dpo")],
)
def test_options_of_another_method_are_refused(impl, file_id, method, options, param):
    with pytest.raises(InvalidRequest, match="another method") as refused:
        impl.submit(request(file_id, method=method, options=options))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("evaluation", "param"),
    [
        ({"split": 0.5, "metric": "accuracy"}, "trl.evaluation.metric"),
        ({"early_stopping": {}}, "trl.evaluation.early_stopping"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(impl, file_id, evaluation, param):
    with pytest.raises(InvalidRequest) as refused:
        impl.submit(request(file_id, options={"evaluation": evaluation}))
    assert refused.value.param == param


def test_data_for_another_method_is_refused(impl, file_id):
    with pytest.raises(InvalidDataset, match="supervised job needs"):
        impl.submit(request(file_id, method="supervised"))


def test_given_values_are_kept(impl, file_id):
    spec = impl.submit(request(file_id, beta=0.3, batch_size=2, n_epochs=4, seed=0)).spec
    assert (spec.beta, spec.batch_size, spec.n_epochs, spec.seed) == (0.3, 2, 4, 0)


def test_names_of_trained_models_differ_between_jobs_of_one_suffix(impl, file_id):
    names = {impl.submit(request(file_id, suffix="polite")).fine_tuned_model for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith(f"ft:{MODEL}:polite:") for name in names)


@pytest.mark.parametrize(
    ("changes", "options", "error", "param", "says"),
    [
        (
            {"learning_rate_multiplier": 2.0},
            {"optimizer": {"learning_rate": 1e-5}},
            InvalidRequest,
            "trl.optimizer.learning_rate",
            "Give one",
        ),
        ({"training_file": "file-absent"}, {}, InvalidRequest, "training_file", "file-absent"),
        ({"validation_file": "file-absent"}, {}, InvalidRequest, "validation_file", "file-absent"),
        ({"model": "org/absent"}, {}, UnknownModel, "model", f"'org/absent'.*HF_HUB_OFFLINE.*{MODEL}"),
        ({"model": "absent"}, {}, UnknownModel, "model", "<org>/<name>"),
        ({"model": "../tiny"}, {}, UnknownModel, "model", "tiny"),
        ({}, {"devices": 7}, ResourcesExceeded, "trl.devices", "7 devices.*1 CPU slot"),
        ({}, {"precision": "fp16"}, ResourcesExceeded, "trl.precision", "fp16 needs a GPU"),
        ({}, {"tf32": True}, ResourcesExceeded, "trl.tf32", "1 CPU slot"),
        (
            {},
            {"tuning": "full", "lora": {"quantization": "nf4"}},
            InvalidRequest,
            "trl.lora.quantization",
            'use "lora"',
        ),
        ({"suffix": "a/b"}, {}, InvalidRequest, "suffix", "a/b"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(impl, file_id, changes, options, error, param, says):
    with pytest.raises(error, match=says) as caught:
        impl.submit(request(**({"training_file": file_id, "options": options} | changes)))
    assert caught.value.param == param
    assert impl.list_jobs().data == []


def test_a_reward_model_is_trained_as_one_only(impl, file_id):
    """transformers would put a random head in place of its own."""
    config = impl.settings.models_path / MODEL / "config.json"
    classifier = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config.write_text(json.dumps(classifier))
    assert impl.submit(request(file_id, method="reward")).spec.method == "reward"
    with pytest.raises(InvalidRequest, match=r"LlamaForSequenceClassification.*writes no text") as caught:
        impl.submit(request(file_id))
    assert caught.value.param == "model"
    config.write_text(json.dumps(classifier | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(InvalidRequest, match="of 2 labels"):
        impl.submit(request(file_id, method="reward"))


def test_weights_that_are_stored_quantized_are_not_all_trained(impl, file_id):
    packed = {"layers.0.up_proj.weight": numpy.zeros((8, 1), numpy.uint8)}
    save_file(packed, impl.settings.models_path / MODEL / "model.safetensors")
    with pytest.raises(InvalidRequest, match="stored quantized") as caught:
        impl.submit(request(file_id, options={"tuning": "full"}))
    assert caught.value.param == "trl.tuning"
    assert impl.submit(request(file_id)).spec.options.tuning == "lora"


def test_quantization_needs_bitsandbytes(impl, file_id, monkeypatch):
    monkeypatch.setattr("bento_service.training.quantization.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourcesExceeded, match=r"install trl-remote\[qlora\]") as caught:
        impl.submit(request(file_id, options={"lora": {"quantization": "nf4"}}))
    assert caught.value.param == "trl.lora.quantization"
    assert impl.list_jobs().data == []


def test_a_held_out_split_and_a_validation_file_contradict_each_other(impl, file_id):
    with pytest.raises(InvalidRequest, match="one of them"):
        impl.submit(request(file_id, validation_file=file_id, options={"evaluation": {"split": 0.5}}))


def test_unknown_models_are_not_asked_of_the_hub_when_it_is_not_to_be_used(tmp_path):
    with core(tmp_path, hub_models=False) as impl, pytest.raises(UnknownModel, match="TRL_HUB_MODELS"):
        impl.submit(request(upload(impl).id, model="org/absent"))


def test_an_unreachable_hub_is_said_to_be_unreachable(impl, file_id, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    with pytest.raises(UnknownModel, match="could not be reached"):
        impl.submit(request(file_id, model="org/absent"))


def test_a_model_that_the_hub_has_is_loaded_by_name(impl, file_id, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, timeout: None)
    assert impl.submit(request(file_id, model="org/absent")).spec.model_path is None


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_rows_that_cannot_be_trained_on_are_named_with_their_file(impl, file_id, param):
    bad = upload(impl, [*PAIRS, {"prompt": "p", "chosen": "c"}]).id
    with pytest.raises(InvalidDataset, match="rejected") as caught:
        impl.submit(request(**({"training_file": file_id} | {param: bad})))
    assert caught.value.param == param
    assert caught.value.report.total_problems == 1
    assert caught.value.problems[0].row == 3
    assert impl.list_jobs().data == []


def test_an_empty_upload_is_refused_and_leaves_nothing(impl):
    with pytest.raises(InvalidDataset, match="empty"):
        impl.upload(io.BytesIO(b""), filename="nothing.jsonl")
    assert impl.list_files().data == []
    assert [path for path in impl.settings.files_path.rglob("*") if path.is_file()] == []


def test_the_same_client_id_and_request_is_the_same_job_even_when_its_data_is_gone(impl, file_id):
    wanted = request(file_id, options={"client_id": "mine"})
    first = impl.submit(wanted)
    impl.cancel(first.id)
    impl.delete_file(file_id)
    again = impl.submit(wanted)
    assert (again.id, again.status) == (first.id, JobStatus.CANCELLED)
    assert len(impl.list_jobs().data) == 1


def test_the_same_client_id_with_another_request_is_a_conflict(impl, file_id):
    first = impl.submit(request(file_id, options={"client_id": "mine"}))
    with pytest.raises(ClientIdConflict, match=first.id):
        impl.submit(request(file_id, n_epochs=2, options={"client_id": "mine"}))


def test_a_file_in_use_is_kept_and_bytes_stay_as_long_as_a_file_names_them(impl, file_id):
    same_bytes = upload(impl)
    job = impl.submit(request(file_id))
    with pytest.raises(Conflict, match=job.id):
        impl.delete_file(file_id)
    impl.cancel(job.id)
    path = impl.file_content(file_id).path
    impl.delete_file(file_id)
    assert path.exists()
    assert impl.file_content(same_bytes.id).path == path
    impl.delete_file(same_bytes.id)
    assert not path.exists()
    with pytest.raises(NotFound):
        impl.get_file(same_bytes.id)


def test_cancel_pause_and_resume(impl, file_id):
    job_id = impl.submit(request(file_id)).id
    assert impl.pause(job_id).status is JobStatus.PAUSED
    assert impl.resume(job_id).status is JobStatus.QUEUED
    assert impl.cancel(job_id).status is JobStatus.CANCELLED
    assert impl.cancel(job_id).status is JobStatus.CANCELLED
    with pytest.raises(TransitionRefused):
        impl.resume(job_id)
    assert impl.count_jobs()[JobStatus.CANCELLED] == 1


def test_a_job_is_there_after_a_restart(tmp_path):
    with core(tmp_path) as impl:
        job = impl.submit(request(upload(impl).id))
    with core(tmp_path) as restarted:
        # The estimate moves with the clock.
        assert replace(restarted.status(job.id), estimated_start=None) == replace(job, estimated_start=None)


def test_a_job_whose_checkpoints_do_not_fit_on_the_disk_is_refused_with_both_numbers(impl, file_id, monkeypatch):
    save_file({"model.layers.0.q_proj.weight": numpy.zeros((1000, 1000), numpy.float32)}, _weights(impl))
    free = 100 * 10**6
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert impl.submit(request(file_id)).status is JobStatus.QUEUED
    # 1e6 parameters of 12 bytes, three checkpoints and one being written, and 64 MiB of the rest.
    with pytest.raises(ResourcesExceeded, match=r"0\.12 GB.*0\.10 GB are free.*now 3") as caught:
        impl.submit(request(file_id, options={"tuning": "full"}))
    assert caught.value.param == "trl.saving.total_limit"
    assert len(impl.list_jobs().data) == 1
    assert impl.submit(request(file_id, options={"tuning": "full", "saving": {"total_limit": 1}})).id


def test_a_job_that_cannot_fit_in_memory_is_refused_unless_told_otherwise(impl, file_id, monkeypatch):
    save_file({"model.layers.0.q_proj.weight": numpy.zeros((1000, 1000), numpy.float32)}, _weights(impl))
    # Full fine-tuning keeps 16 bytes of each of the 1e6 parameters: itself, its gradient and two moments.
    monkeypatch.setattr("bento_service.distribution.device_memory", lambda devices: 14_400_000)
    with pytest.raises(ResourcesExceeded, match=r"0\.02 GB of memory.*device has 0\.01 GB.*lora") as caught:
        impl.submit(request(file_id, options={"tuning": "full"}))
    assert caught.value.param == "trl.tuning"
    assert impl.list_jobs().data == []
    assert impl.submit(request(file_id)).id
    assert impl.submit(request(file_id, options={"tuning": "full", "check_memory": False})).id
    # Within the margin of the estimate the job gets its chance.
    monkeypatch.setattr("bento_service.distribution.device_memory", lambda devices: 14_800_000)
    assert impl.submit(request(file_id, options={"tuning": "full"})).id


def test_weights_that_were_not_downloaded_are_refused(impl, file_id):
    _weights(impl).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InvalidRequest, match="git lfs pull") as caught:
        impl.submit(request(file_id))
    assert caught.value.param == "model"
    assert impl.list_jobs().data == []


def _weights(impl):
    return impl.settings.models_path / MODEL / "model.safetensors"
