"""Jobs on several devices: what is refused, and by which way the devices share the training."""

from dataclasses import replace

import pytest

from bento_service.distribution import batch_size, distribution, require_divisible, require_shareable
from bento_service.errors import InvalidRequest
from bento_service.jobs.devices import Devices
from bento_service.training.model_shape import ModelShape
from tests.core_factory import request
from tests.job_factory import make_job

GPUS = Devices("cuda", ("0", "1", "2"))
SLOTS = Devices("cpu", ("0", "1", "2"))
# One linear layer of a million parameters: 16 bytes each in full fine-tuning in fp32, and 4 of each for ddp's buckets.
SHAPE = ModelShape(tensors={"model.layers.0.q_proj.weight": (1000, 1000)}, architecture=None)
OVERHEAD = 1_000_000_000


@pytest.mark.parametrize(
    ("options", "changes", "devices", "param", "says"),
    [
        ({"devices": 1, "distribution": "fsdp"}, {}, GPUS, "trl.distribution", "2 or more"),
        ({"devices": 3}, {"batch_size": 8}, GPUS, "method.dpo.hyperparameters.batch_size", "use 6 or 9"),
        ({"devices": 3}, {"batch_size": 2}, GPUS, "method.dpo.hyperparameters.batch_size", "use 3\\."),
        ({"devices": 2, "evaluation": {"batch_size": 5}}, {}, GPUS, "trl.evaluation.batch_size", "use 4 or 6"),
        ({"devices": 2}, {"method": "kto", "batch_size": 2}, GPUS, "method.kto.hyperparameters.batch_size", "of 4"),
        ({"devices": 2, "dpo": {"loss_type": ["sigmoid", "sft"]}}, {}, GPUS, "trl.dpo.loss_type", "sft"),
        ({"devices": 2, "distribution": "fsdp"}, {}, SLOTS, "trl.distribution", "needs GPUs.*CPU"),
        ({"devices": 2, "distribution": "deepspeed"}, {}, GPUS, "trl.distribution", "install the package deepspeed"),
        (
            {"devices": 2, "distribution": "fsdp", "lora": {"quantization": "nf4"}},
            {},
            GPUS,
            "trl.distribution",
            "use trl.distribution ddp",
        ),
    ],
)
def test_what_devices_cannot_share_is_refused(options, changes, devices, param, says, monkeypatch):
    monkeypatch.setattr("bento_service.distribution.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=says) as refused:
        require_shareable(request("file-1", options=options, **changes), devices)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"devices": 2}, {}),
        ({"devices": 3, "distribution": "fsdp"}, {"batch_size": 6}),
        ({"devices": 1, "dpo": {"loss_type": ["sft"]}}, {"batch_size": 3}),
        ({"devices": 2, "kto": {"loss_type": "apo_zero_unpaired"}}, {"method": "kto", "batch_size": 2}),
    ],
)
def test_what_they_can_share_is_not(options, changes):
    require_shareable(request("file-1", options=options, **changes), GPUS)


def test_the_default_batch_can_be_shared():
    assert [batch_size(8, devices) for devices in (1, 2, 3, 8, 16)] == [8, 8, 9, 8, 16]


@pytest.mark.parametrize(
    ("options", "memory", "chosen"),
    [
        ({"devices": 1}, 10**12, None),
        ({"devices": 2}, 10**12, "ddp"),
        ({"devices": 2}, None, "ddp"),
        # 1.02 GB in all, and four fifths of a device may be filled.
        ({"devices": 2}, round((OVERHEAD + 20e6) / 0.8) + 1, "ddp"),
        ({"devices": 2}, round((OVERHEAD + 20e6) / 0.8) - 1, "fsdp"),
        ({"devices": 2, "distribution": "ddp"}, 1, "ddp"),
        ({"devices": 2, "distribution": "fsdp"}, 10**12, "fsdp"),
    ],
)
def test_devices_share_a_model_that_does_not_fit_one_of_them(options, memory, chosen, monkeypatch):
    monkeypatch.setattr("bento_service.distribution.device_memory", lambda devices: memory)
    spec = make_job(options={"tuning": "full", "precision": "fp32"} | options).spec
    assert distribution(spec, SHAPE, GPUS) == chosen


def test_a_model_that_is_stored_quantized_is_whole_on_each_device(monkeypatch):
    monkeypatch.setattr("bento_service.distribution.device_memory", lambda devices: 1)
    stored, spec = replace(SHAPE, packed=1000), make_job(options={"devices": 2}).spec
    assert (distribution(spec, SHAPE, GPUS), distribution(spec, stored, GPUS)) == ("fsdp", "ddp")
    with pytest.raises(InvalidRequest, match="stored quantized"):
        require_divisible(spec.model_copy(update={"distribution": "fsdp"}), stored)


def test_on_a_cpu_and_for_a_model_of_unknown_size_each_has_the_whole(monkeypatch):
    monkeypatch.setattr("bento_service.distribution.device_memory", lambda devices: 1)
    spec = make_job(options={"devices": 2}).spec
    assert distribution(spec, SHAPE, SLOTS) == "ddp"
    assert distribution(spec, None, GPUS) == "ddp"


@pytest.mark.parametrize(
    ("method", "chosen", "refused"), [("dpo", "fsdp", True), ("kto", "fsdp", True), ("kto", "ddp", False)]
)
def test_a_model_in_parts_is_no_reference_before_training(method, chosen, refused):
    spec = make_job(options={"devices": 2, method: {"precompute_ref_log_probs": True}}).spec
    spec = spec.model_copy(update={"method": method, "distribution": chosen})
    if not refused:
        require_divisible(spec, SHAPE)
        return
    with pytest.raises(InvalidRequest, match="leave it out") as caught:
        require_divisible(spec, SHAPE)
    assert caught.value.param == f"trl.{method}.precompute_ref_log_probs"
