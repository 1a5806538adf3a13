"""A QLoRA run: stopped and resumed it ends as one that was not, and its checkpoint says what it is an adapter of."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bento_service.training.__main__ import main
from tests.tiny_model import make_tiny_model
from tests.trainer_run import events_of, losses, make_run, preference_rows, write_rows

pytestmark = pytest.mark.usefixtures("signals")


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))
    options = {"n_epochs": 2, "lora": {"quantization": "nf4", "use_dora": True}}
    whole = make_run(tmp_path / "whole", model, rows, **options)
    assert main([str(whole.path), "--attempt", "1"]) == 0
    first, last = whole.complete_checkpoints()
    assert (first.name, last.name) == ("checkpoint-4", "checkpoint-8")
    assert any(event.data.get("packing") is True for event in events_of(whole, "message"))

    resumed = make_run(tmp_path / "resumed", model, rows, **options)
    shutil.copytree(first, resumed.checkpoints / first.name)
    assert main([str(resumed.path), "--attempt", "1"]) == 0
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 4}
    weights = load_file(last / "adapter_model.safetensors")
    again = load_file(resumed.complete_checkpoints()[-1] / "adapter_model.safetensors")
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if "magnitude" in name else torch.bfloat16)
        assert torch.equal(tensor, again[name])

    assert "quantized to 4 bits" in (last / "README.md").read_text()
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["settings"]["options"]["lora"]["quantization"] == "nf4"
    assert manifest["versions"]["bitsandbytes"] == version("bitsandbytes")
