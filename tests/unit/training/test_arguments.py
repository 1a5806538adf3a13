"""What a specification and a device come to in transformers' arguments. Needs no GPU: nothing is computed."""

from pathlib import Path

import pytest

from bento_service.errors import InvalidRequest
from bento_service.training.arguments import shared_arguments
from bento_service.training.devices import Device
from bento_service.training.run_directory import RunDirectory
from tests.job_factory import make_job

GPU = Device(kind="cuda", has_bf16=True)


def tf32_of(tmp_path: Path, device: Device, **options: object) -> bool | None:
    return shared_arguments(make_job(options=options).spec, RunDirectory(tmp_path), device, "fp32")["tf32"]


def test_tf32_is_on_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: True)
    assert tf32_of(tmp_path, GPU, tf32=True) is True
    assert tf32_of(tmp_path, GPU) is None  # float32 stays float32


def test_tf32_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: False)
    for device in (GPU, Device(kind="cpu", has_bf16=True)):
        with pytest.raises(InvalidRequest, match="compute capability") as caught:
            tf32_of(tmp_path, device, tf32=True)
        assert caught.value.param == "tf32"
