"""QLoRA: packed DPO over 4-bit weights gives stock TRL's numbers; no scores of other weights are taken for its."""

from pathlib import Path

import pytest
import torch

from bento_service.training.devices import Device
from bento_service.training.model_shape import ModelShape
from bento_service.training.models import load_model
from bento_service.training.quantization import Quantization
from bento_service.training.reference import ReferenceCache
from tests.exactness.test_packed_dpo import close
from tests.exactness.trainers import Tuning, loss_and_gradients, make_pairs, make_trainer, perturb

PAIRS = make_pairs(12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_equals_stock(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Loss, metrics and gradients, with the reference being the quantized model without the adapter."""
    results = []
    for packed in (False, True):
        trainer = make_trainer(folders[kind], tmp_path, packed=packed, pairs=PAIRS, tuning="nf4", max_row_tokens=80)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL's bf16 would round the differences that are looked for
        perturb(trainer.model)
        results.append(loss_and_gradients(trainer, list(trainer.train_dataset)[:7]))
    close(*results)


def test_packed_trains_as_stock(folders: dict[str, Path], tmp_path: Path) -> None:
    """With the adapter in bf16, as TRL keeps it: what differs is what bf16 rounds, some 0.004 of each value."""
    losses = []
    for packed in (False, True):
        trainer = make_trainer(folders["llama"], tmp_path, packed=packed, pairs=PAIRS, tuning="nf4")
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert min(losses[0]) < losses[0][0] - 0.01  # it trains
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_reference_scores_are_kept_by_quantization(folders: dict[str, Path], tmp_path: Path) -> None:
    reused = {}
    tunings: list[Tuning] = ["lora", "nf4", "nf4"]
    for number, tuning in enumerate(tunings):
        trainer = make_trainer(
            folders["llama"], tmp_path / str(number), packed=True, pairs=PAIRS, tuning=tuning,
            precompute_ref_log_probs=True, reference_cache=ReferenceCache(tmp_path / "cache"),
        )  # fmt: skip
        reused[number] = trainer.reference_reused
    assert reused == {0: [], 1: [], 2: ["train", "eval"]}


def test_eight_bits_are_not_packed(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make_trainer(folders["llama"], tmp_path, packed=True, pairs=PAIRS, tuning="int8", falls_back=True)
    assert "8 bits" in trainer.fallback
    loss, gradients, _ = loss_and_gradients(trainer, list(trainer.train_dataset)[:4])
    assert loss == pytest.approx(0.6931, abs=1e-2)
    assert gradients


@pytest.mark.parametrize("stored", [False, True])
def test_an_evaluation_leaves_the_weights_trainable(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would rearrange them for inference. Also of models stored in 4 bits."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    here = Device(kind="cpu", has_bf16=True)
    model = load_model("tiny", folders["llama"], quantization=Quantization(name="nf4", precision="fp32", device=here))
    if stored:
        model.save_pretrained(tmp_path)
        shape = ModelShape.of(tmp_path)
        assert shape.packed > 0 and "model.layers.0.mlp.up_proj.weight" not in shape.tensors
        model = load_model("tiny", tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(1, 9)[None])
    assert torch.equal(layer.weight, before)
    inputs = torch.ones(2, 64, requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
