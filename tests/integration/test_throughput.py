"""What a metrics event says of a step's cost is counted right. No unit test, because torch takes seconds to load."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer import reward_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bento_service.training.dpo import CountingDPOTrainer
from bento_service.training.flops import PEAK_FLOPS, device_flops, flops_per_position
from bento_service.training.kto import CountingKTOTrainer
from bento_service.training.lora import lora_config
from bento_service.training.reward import CountingRewardTrainer
from bento_service.training.sft import CountingSFTTrainer
from bento_service.training.spec import LoraOptions
from bento_service.training.throughput import BatchSize, CountingTrainer, Meter, Totals, peak_memory
from tests.tiny_model import make_tiny_model
from tests.trainer_run import make_run


def size(kind: type[CountingTrainer], inputs: dict[str, Any]) -> BatchSize:
    return CountingTrainer.batch_size(SimpleNamespace(sequences_per_row=kind.sequences_per_row), inputs)  # type: ignore[arg-type]


def test_a_batch_of_pairs() -> None:
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [4]},
    ]
    # Sequences of 3, 2, 5 and 2 tokens, the end token (0) among them being no padding.
    inputs = DataCollatorForPreference(pad_token_id=0)(pairs)
    assert size(CountingDPOTrainer, inputs) == BatchSize(rows=2, tokens=12, computed=20, padding=8)
    scored = reward_trainer.DataCollatorForPreference(pad_token_id=0)(
        [{"chosen_ids": [1, 2, 0], "rejected_ids": [4, 0]}]
    )
    assert size(CountingRewardTrainer, scored) == BatchSize(rows=1, tokens=5, computed=6, padding=1)


def test_a_batch_of_rows_padded_and_packed() -> None:
    padded = DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": [1, 2, 0]}, {"input_ids": [4, 0]}])
    assert size(CountingSFTTrainer, padded) == BatchSize(rows=2, tokens=5, computed=6, padding=1)
    packs = [{"input_ids": [1, 2, 0, 4, 0], "seq_lengths": [3, 2]}, {"input_ids": [5, 0], "seq_lengths": [2]}]
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packs)
    assert size(CountingSFTTrainer, packed) == BatchSize(rows=3, tokens=7, computed=7, padding=0)


def test_flops_of_a_position(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    weights = sum(parameter.numel() for parameter in model.parameters())  # the embeddings are the head too
    assert flops_per_position(model, all_trained=True, further_passes=0) == 6 * weights
    assert flops_per_position(model, all_trained=True, further_passes=1) == 8 * weights
    adapted = get_peft_model(model, lora_config(LoraOptions(), model))
    both = sum(parameter.numel() for parameter in adapted.parameters())
    assert both > weights
    assert flops_per_position(adapted, all_trained=False, further_passes=0) == 4 * both


@pytest.mark.parametrize(("scored_before", "dpo", "kto"), [(False, 1, 3), (True, 0, 1)])
def test_passes_of_reference_models(scored_before: bool, dpo: int, kto: int) -> None:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(precompute_ref_log_probs=scored_before), calculate_KL=True)
    assert CountingDPOTrainer.further_passes(trainer) == dpo
    assert CountingKTOTrainer.further_passes(trainer) == kto
    assert CountingSFTTrainer.further_passes(trainer) == 0


def test_a_gpu_is_known_by_its_longest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 0))]))
    for name, peak in [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla V100-PCIE-16GB", 112e12),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_flops(on_gpu) == peak
    for name in ("Something else", "NVIDIA RTX A4000", "NVIDIA A10G", "NVIDIA T400 4GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_flops(on_gpu) is None
    names = list(PEAK_FLOPS)
    shadowed = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
    assert shadowed == []  # a name that is part of another comes after it


def test_a_meter_reads_what_was_added_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("bento_service.training.throughput.time.monotonic", lambda: clock.now)
    monkeypatch.setattr("bento_service.training.throughput.device_flops", lambda _: 1e9)
    trainer: Any = SimpleNamespace(
        totals=Totals(rows=7, tokens=7, computed=7),
        model=model,
        args=SimpleNamespace(bf16=True, fp16=False),
        further_passes=lambda: 0,
        accelerator=SimpleNamespace(num_processes=2),
    )
    spec = make_run(tmp_path / "run", None, tmp_path / "rows.jsonl", method="supervised", tuning="full").read_spec()
    meter = Meter(trainer, spec)
    trainer.totals.rows += 4
    trainer.totals.tokens += 60
    trainer.totals.computed += 80
    trainer.totals.padding += 20
    clock.now += 2.0
    meter.step_ended()
    clock.now += 50.0  # an evaluation
    meter.restart()
    values = meter.read()
    assert values.pop("memory_peak_bytes") > 10**8  # torch alone takes more
    assert values == {
        "padding_fraction": 0.25,
        "tokens_per_second": 30.0,
        "rows_per_second": 2.0,
        "model_flops_utilization": pytest.approx(
            60 * 6 * sum(parameter.numel() for parameter in model.parameters()) / (2 * 2e9)  # two devices, two seconds
        ),
    }
    assert set(meter.read()) == {"memory_peak_bytes"}
    assert peak_memory() < 10**12
