"""A KTO run with a tiny model: it trains as a plain TRL script does, and ends with a checkpoint like any other."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from bento_service.training.__main__ import main
from tests.tiny_model import make_tiny_model
from tests.trainer_run import events_of, losses, make_run, preference_rows, write_rows

pytestmark = pytest.mark.usefixtures("signals")


def unpaired_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, pair in enumerate(preference_rows(count))
    ]


def test_a_run_equals_a_plain_trl_script(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    rows = unpaired_rows(12)
    run = make_run(
        tmp_path / "run",
        model,
        write_rows(tmp_path / "train.jsonl", rows),
        method="kto",
        validation_file=write_rows(tmp_path / "held_out.jsonl", rows[:4]),
        batch_size=4,
        n_epochs=2,
        shuffle=False,
    )
    assert main([str(run.path), "--attempt", "1"]) == 0

    plain = KTOTrainer(
        model=str(model),
        args=KTOConfig(
            output_dir=str(tmp_path / "plain"),
            seed=7,
            use_cpu=True,
            bf16=False,
            max_length=2048,
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            num_train_epochs=2,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_steps=0.1,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    plain.train()
    expected = {entry["step"]: entry["loss"] for entry in plain.state.log_history if "loss" in entry}
    assert len(expected) == 6
    assert losses(run) == pytest.approx(expected, rel=1e-5, abs=1e-6)

    (last,) = [event.data for event in events_of(run, "metrics") if event.data["step"] == 6]
    assert {"rewards/margins", "kl", "rows_per_second", "padding_fraction"} <= last.keys()
    assert [event.data["step"] for event in events_of(run, "evaluation")] == [0, 3, 6]
    checkpoint = run.complete_checkpoints()[-1]
    assert checkpoint.name == "checkpoint-6"
    assert "after Kahneman-Tversky optimization" in (checkpoint / "README.md").read_text()
