"""A reward model's run with a tiny model: it trains as a plain TRL script does, resumes, and the result scores."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from bento_service.training.__main__ import main
from tests.tiny_model import make_tiny_model
from tests.trainer_run import events_of, losses, make_run, preference_rows, train, write_rows

ROWS = preference_rows(12)


pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def plain_losses(model: Path, output: Path, tuning: str) -> dict[int, float]:
    """Of a TRL script that does the same."""
    set_seed(7)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    plain = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32),
        args=RewardConfig(
            output_dir=str(output),
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
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora if tuning == "lora" else None,
    )
    plain.train()
    return {entry["step"]: entry["loss"] for entry in plain.state.log_history if "loss" in entry}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_equals_a_plain_trl_script(tmp_path: Path, model: Path, rows: Path, tuning: str) -> None:
    options: dict[str, Any] = {
        "method": "reward", "beta": None, "batch_size": 4, "n_epochs": 2, "tuning": tuning,
        "validation_file": rows, "evaluation": {"metric": "accuracy"},
    }  # fmt: skip
    run = make_run(tmp_path / "run", model, rows, **options)
    assert main([str(run.path), "--attempt", "1"]) == 0
    expected = plain_losses(model, tmp_path / "plain", tuning)
    assert len(expected) == 6
    assert losses(run) == pytest.approx(expected, rel=1e-5, abs=1e-6)

    (last,) = [event.data for event in events_of(run, "metrics") if event.data["step"] == 6]
    assert {"accuracy", "margin", "mean_reward", "rows_per_second", "padding_fraction"} <= last.keys()
    evaluations = [event.data for event in events_of(run, "evaluation")]
    assert [data["step"] for data in evaluations] == [0, 3, 6]
    assert "best so far: eval_accuracy" in events_of(run, "message")[-1].message

    # From the first checkpoint on, as if the rest had been lost.
    first, final = run.complete_checkpoints()
    resumed = make_run(tmp_path / "resumed", model, rows, **options)
    shutil.copytree(first, resumed.checkpoints / first.name)
    assert main([str(resumed.path), "--attempt", "1"]) == 0
    assert losses(resumed) == {step: loss for step, loss in losses(run).items() if step > 3}

    # What was saved scores as the evaluation said.
    kind = AutoModelForSequenceClassification if tuning == "full" else AutoPeftModelForSequenceClassification
    if tuning == "lora":  # the base model's name is the user's, which is a folder here
        adapter_config = final / "adapter_config.json"
        adapter_config.write_text(adapter_config.read_text().replace("test/tiny", str(model)))
    scorer = kind.from_pretrained(final, num_labels=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    rewards = {}
    for side in ("chosen", "rejected"):
        texts = tokenizer.apply_chat_template(
            [row["prompt"] + row[side] for row in ROWS], padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            rewards[side] = scorer(**texts).logits[:, 0]
    accuracy = (rewards["chosen"] > rewards["rejected"]).float().mean().item()
    assert accuracy == pytest.approx(evaluations[-1]["eval_accuracy"])
    margin = (rewards["chosen"] - rewards["rejected"]).mean().item()
    assert margin == pytest.approx(evaluations[-1]["eval_margin"], rel=1e-3)
    card = (final / "README.md").read_text()
    assert "after reward modeling" in card and "AutoModelForSequenceClassification" in card
    assert "| accuracy | margin |" in card


def test_two_devices_compute_what_one_does(tmp_path: Path, model: Path) -> None:
    """The second batch has one row: one rank has it, the other none. Metrics are over all rows, too."""
    rows = write_rows(tmp_path / "train.jsonl", ROWS[:5])
    runs = [
        make_run(
            tmp_path / str(devices), model, rows, method="reward", beta=None, tuning="full", batch_size=4,
            n_epochs=2, validation_file=rows, devices=devices,
        )
        for devices in (1, 2)
    ]  # fmt: skip
    alone, shared = runs
    shared.write_spec(shared.read_spec().model_copy(update={"distribution": "ddp"}))
    assert main([str(alone.path), "--attempt", "1"]) == 0
    outcome = train(shared)
    assert outcome.status == "succeeded", shared.log_tail()
    for kind, names in (
        ("metrics", ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")),
        ("evaluation", ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")),
    ):
        expected = [[event.data[name] for name in names] for event in events_of(alone, kind)]
        found = [[event.data[name] for name in names] for event in events_of(shared, kind)]
        assert found == [pytest.approx(values, rel=1e-5, abs=1e-5) for values in expected]


def test_pairs_that_are_too_long_are_left_out(tmp_path: Path, model: Path, rows: Path) -> None:
    run = make_run(tmp_path / "run", model, rows, method="reward", beta=None, max_length=60, max_steps=1)
    assert main([str(run.path), "--attempt", "1"]) == 0
    (warning,) = [event for event in events_of(run, "message") if event.level == "warn"]
    assert "of 12 pairs are left out" in warning.message

    none = make_run(tmp_path / "none", model, rows, method="reward", beta=None, max_length=4)
    assert main([str(none.path), "--attempt", "1"]) == 1
    outcome = none.read_outcome(1)
    assert outcome is not None
    assert (outcome.code, outcome.param) == ("invalid_dataset", "training_file")


def test_a_reward_model_is_no_language_model_and_may_be_trained_further(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    trained = make_run(tmp_path / "run", model, rows, method="reward", beta=None, tuning="full", max_steps=1)
    assert main([str(trained.path), "--attempt", "1"]) == 0
    scorer = trained.complete_checkpoints()[-1]

    dpo = make_run(tmp_path / "dpo", scorer, rows)
    assert main([str(dpo.path), "--attempt", "1"]) == 1
    outcome = dpo.read_outcome(1)
    assert outcome is not None and outcome.message is not None
    assert (outcome.code, outcome.param) == ("invalid_request", "model")
    assert "LlamaForSequenceClassification" in outcome.message

    further = make_run(
        tmp_path / "further", scorer, rows, method="reward", beta=None, max_steps=1,
        lora={"quantization": "nf4", "target_modules": ["q_proj"]},
    )  # fmt: skip
    assert main([str(further.path), "--attempt", "1"]) == 0
