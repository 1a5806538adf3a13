"""The disk a job needs is counted from its model's own tensors."""

import json
import struct

import pytest

from bento_service.errors import InvalidRequest
from bento_service.jobs.disk import disk_need
from tests.job_factory import make_job


@pytest.fixture
def model(tmp_path):
    """Headers only: an embedding of 100 x 8, one linear layer of 8 x 16, a norm of 8."""
    shapes = {"embed_tokens.weight": [100, 8], "layers.0.mlp.up_proj.weight": [16, 8], "norm.weight": [8]}
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return str(folder)


def spec(model, **options):
    job = make_job(options=options)
    return job.spec.model_copy(update={"model_path": model})


def test_checkpoints_kept_and_optimizer_count(model, tmp_path):
    rest = disk_need(spec(None), tmp_path).needed
    adamw = disk_need(spec(model, tuning="full", saving={"total_limit": 2}), tmp_path).needed - rest
    sgd = disk_need(spec(model, tuning="full", saving={"total_limit": 2}, optimizer={"name": "sgd"}), tmp_path)
    assert adamw == 936 * 12 * 3
    assert sgd.needed - rest == 936 * 4 * 3


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 3) + b"{}x", struct.pack("<Q", 2) + b"[]"])
def test_weights_that_are_none_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"model\.safetensors"):
        disk_need(spec(str(tmp_path)), tmp_path)


def test_free_space_is_that_of_the_runs_disk_before_it_exists(model, tmp_path):
    need = disk_need(spec(model), tmp_path / "not" / "yet")
    assert need.fits and need.free > 0
    assert "GB" in need.describe()
