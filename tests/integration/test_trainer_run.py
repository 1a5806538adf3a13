"""Trainer processes with a tiny model: what they report, that they train as TRL does, and that they resume exactly."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import bento_service
from bento_service.training import checkpoints, manifest
from bento_service.training.run_directory import COMPLETE_MARKER, RunDirectory
from tests.tiny_model import make_tiny_model
from tests.trainer_run import (
    DEADLINE,
    ENVIRONMENT,
    REPOSITORY,
    Trainer,
    events_of,
    losses,
    make_run,
    preference_rows,
    train,
    write_rows,
)

PAIRS, HELD_OUT, BATCH, EPOCHS = 40, 6, 2, 2
STEPS = PAIRS // BATCH * EPOCHS
DROPOUT = 0.1  # uses the random state in every step, so a resume that lost it would show


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_model(folder / "model")
    rows = preference_rows(PAIRS + HELD_OUT)
    write_rows(folder / "train.jsonl", rows[:PAIRS])
    write_rows(folder / "held_out.jsonl", rows[PAIRS:])
    return folder


def lora_run(folder: Path, data: Path) -> RunDirectory:
    return make_run(
        folder,
        data / "model",
        data / "train.jsonl",
        validation_file=data / "held_out.jsonl",
        batch_size=BATCH,
        n_epochs=EPOCHS,
        lora={"dropout": DROPOUT},
        saving={"strategy": "steps", "steps": 5, "total_limit": 2},
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A LoRA run that nothing disturbed."""
    run = lora_run(tmp_path_factory.mktemp("finished"), data)
    assert train(run).status == "succeeded"
    return run


def plain_script(data: Path, *arguments: str) -> list[dict[str, float]]:
    """What examples/dpo_script.py logs."""
    output = subprocess.run(
        [
            *(sys.executable, "examples/dpo_script.py", str(data / "model"), str(data / "train.jsonl")),
            *("--learning-rate", "1e-3", "--batch-size", str(BATCH), "--seed", "7", *arguments),
        ],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_the_events_tell_the_whole_run(finished: RunDirectory) -> None:
    assert events_of(finished, "message")[0].message == "starting"
    assert all(event.level == "info" for event in events_of(finished, "message"))

    start = events_of(finished, "progress")[0].data
    assert (start["step"], start["total_steps"], start["tokens"]) == (0, STEPS, 0)

    metrics = [event.data for event in events_of(finished, "metrics")]
    assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    assert {entry["total_steps"] for entry in metrics} == {STEPS}
    assert metrics[-1]["epoch"] == EPOCHS
    tokens = [entry["tokens"] for entry in metrics]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 2 * tokens[PAIRS // BATCH - 1]  # both epochs train on the same tokens
    for entry in metrics:
        assert {"loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies"} <= entry.keys()
        assert entry["tokens_per_second"] > 0
    assert metrics[-1]["loss"] < metrics[0]["loss"]

    evaluations = [event.data for event in events_of(finished, "evaluation")]
    assert [entry["step"] for entry in evaluations] == [0, STEPS // 2, STEPS]
    assert evaluations[0]["eval_rewards/margins"] == 0  # the policy is still the reference
    assert evaluations[-1]["eval_rewards/margins"] > 0
    assert 0 <= evaluations[-1]["eval_rewards/accuracies"] <= 1

    saved = [event.data for event in events_of(finished, "checkpoint")]
    assert [entry["step"] for entry in saved] == list(range(5, STEPS + 1, 5))
    assert [entry["final"] for entry in saved] == [False] * (len(saved) - 1) + [True]


def test_the_newest_checkpoints_are_kept_whole_and_without_pickled_arguments(finished: RunDirectory) -> None:
    kept = finished.complete_checkpoints()
    assert [path.name for path in kept] == [f"checkpoint-{STEPS - 5}", f"checkpoint-{STEPS}"]
    last = events_of(finished, "checkpoint")[-1].data
    assert last["path"] == str(kept[-1])
    files = {path for path in kept[-1].rglob("*") if path.is_file() and path.name != COMPLETE_MARKER}
    assert last["bytes"] == sum(path.stat().st_size for path in files)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {path.name for path in files}
    assert "training_args.bin" not in {path.name for path in files}
    assert not finished.cache.exists()


def test_the_final_checkpoint_is_a_peft_adapter_that_was_trained(data: Path, finished: RunDirectory) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = finished.complete_checkpoints()[-1]
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    model = peft.PeftModel.from_pretrained(base, checkpoint)
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(weight.abs().sum() > 0 for weight in trained)
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_a_finished_run_has_a_manifest(data: Path, finished: RunDirectory) -> None:
    made = manifest.read(finished)
    assert made is not None
    assert (made.method, made.base_model, made.seed, made.settings["beta"]) == ("dpo", "test/tiny", 7, 0.1)
    digests = {dataset.role: dataset.sha256 for dataset in made.datasets}
    assert digests == {
        "training": hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest(),
        "validation": hashlib.sha256((data / "held_out.jsonl").read_bytes()).hexdigest(),
    }
    assert made.versions["trl"] == version("trl")
    assert made.versions["trl-remote"] == bento_service.__version__
    assert made.build.bento is None
    assert made.hardware.cpu_cores == os.cpu_count()
    last = events_of(finished, "metrics")[-1].data
    assert (made.metrics.step, made.metrics.tokens) == (STEPS, last["tokens"])
    assert made.metrics.training["loss"] == last["loss"]
    evaluated = [(entry.step, entry.metrics["eval_loss"]) for entry in made.metrics.evaluations]
    assert evaluated == [(event.data["step"], event.data["eval_loss"]) for event in events_of(finished, "evaluation")]
    checkpoint = finished.complete_checkpoints()[-1]
    assert made.checkpoint is not None
    assert (made.checkpoint.step, made.checkpoint.final) == (STEPS, True)
    for file in made.checkpoint.files:
        assert hashlib.sha256((checkpoint / file.name).read_bytes()).hexdigest() == file.sha256
    names = {file.name for file in made.checkpoint.files}
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not {"optimizer.pt", "trainer_state.json", "rng_state.pth"} & names


def test_the_model_card_is_one_for_the_hub(finished: RunDirectory) -> None:
    card = ModelCard.load(finished.complete_checkpoints()[-1] / "README.md")
    assert card.data.base_model == "test/tiny"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert {"trl", "dpo", "lora"} <= set(card.data.tags)
    evaluations = events_of(finished, "evaluation")
    assert f"| 0 | {evaluations[0].data['eval_loss']:.4f} |" in card.text
    assert f"| {STEPS} | {evaluations[-1].data['eval_loss']:.4f} |" in card.text


def test_nothing_that_is_handed_out_names_a_place_on_this_host(data: Path, finished: RunDirectory) -> None:
    places = [str(data), str(finished.path), str(REPOSITORY)]
    for checkpoint in finished.complete_checkpoints():
        assert json.loads((checkpoint / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "test/tiny"
        for name in checkpoints.read_manifest(checkpoint).published:
            content = (checkpoint / name).read_bytes()
            assert not any(place.encode() in content for place in places), name
    text = finished.manifest_file.read_text()
    assert not any(place in text for place in places)


@pytest.mark.parametrize(("packing", "dropout"), [(True, 0.0), (False, DROPOUT)], ids=["packed", "padded"])
def test_lora_losses_and_evaluations_equal_a_plain_trl_script(
    data: Path, tmp_path: Path, packing: bool, dropout: float
) -> None:
    """Dropout draws other random numbers in packed batches, so with it only padded ones give the script's numbers."""
    run = make_run(
        tmp_path,
        data / "model",
        data / "train.jsonl",
        validation_file=data / "held_out.jsonl",
        batch_size=BATCH,
        lora={"dropout": dropout},
        dpo={"packing": packing},
    )
    assert train(run).status == "succeeded"
    assert [event.data["packing"] for event in events_of(run, "message") if "packing" in event.data] == [packing]
    logs = plain_script(data, "--lora-dropout", str(dropout), "--eval-file", str(data / "held_out.jsonl"))
    script_losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert len(script_losses) == PAIRS // BATCH
    assert losses(run) == pytest.approx(script_losses, rel=1e-5, abs=1e-6)
    script_margins = [entry["eval_rewards/margins"] for entry in logs if "eval_loss" in entry]
    margins = [event.data["eval_rewards/margins"] for event in events_of(run, "evaluation")]
    assert margins == pytest.approx(script_margins, rel=1e-5, abs=1e-6)


def test_full_fine_tuning_losses_equal_a_plain_trl_script_and_the_model_loads(data: Path, tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        data / "model",
        data / "train.jsonl",
        batch_size=BATCH,
        tuning="full",
        gradient_accumulation_steps=3,
        dpo={"loss_type": ["sigmoid", "sft"]},
    )
    assert train(run).status == "succeeded"
    logs = plain_script(
        data, "--tuning", "full", "--gradient-accumulation-steps", "3", "--loss-type", "sigmoid", "sft"
    )
    script_losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert len(script_losses) == 7  # 20 batches in threes; the last group is smaller
    assert losses(run) == pytest.approx(script_losses, rel=1e-5, abs=1e-6)

    from transformers import AutoModelForCausalLM

    (checkpoint,) = run.complete_checkpoints()
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    assert any(not weight.equal(other) for weight, other in zip(trained.parameters(), base.parameters(), strict=True))


def test_a_run_stopped_and_killed_on_the_way_ends_as_one_that_was_not(
    data: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    run = lora_run(tmp_path, data)
    with Trainer(run, attempt=1) as trainer:
        trainer.wait_for(lambda event: event.type == "metrics" and event.data["step"] == 3)
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end().status == "stopped"
    stopped_at = max(losses(run))
    assert 3 <= stopped_at < STEPS
    assert run.complete_checkpoints()[-1].name == f"checkpoint-{stopped_at}"

    with Trainer(run, attempt=2) as trainer:
        trainer.wait_for(lambda event: event.type == "metrics" and event.data["step"] > stopped_at + 6)
        trainer.process.kill()
        trainer.process.wait()
    assert run.read_outcome(attempt=2) is None
    # As if the kill had come while a later checkpoint was being written.
    torn = run.checkpoints / f"checkpoint-{STEPS - 1}"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")

    assert train(run, attempt=3).status == "succeeded"
    assert not torn.exists()
    warnings = [event.message for event in events_of(run, "message") if event.level == "warn"]
    assert any(torn.name in warning for warning in warnings)
    assert losses(run) == pytest.approx(losses(finished), rel=1e-5, abs=1e-6)
    final_tokens = [events_of(each, "metrics")[-1].data["tokens"] for each in (run, finished)]
    assert final_tokens[0] == final_tokens[1]
    evaluated = {event.data["step"]: event.data["eval_loss"] for event in events_of(run, "evaluation")}
    expected = {event.data["step"]: event.data["eval_loss"] for event in events_of(finished, "evaluation")}
    assert evaluated == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_an_evaluation_left_by_a_stop_is_made_up_for(data: Path, tmp_path: Path) -> None:
    many = write_rows(
        tmp_path / "many.jsonl", preference_rows(60)
    )  # one by one: a second or more, so the stop falls into it
    run = make_run(
        tmp_path / "run",
        data / "model",
        data / "train.jsonl",
        validation_file=many,
        batch_size=BATCH,
        max_steps=1,  # in mid-epoch, where a resumed Trainer would make one step too many
        evaluation={"strategy": "end", "before_training": False, "batch_size": 1},
        saving={"strategy": "end"},
    )
    with Trainer(run, attempt=1) as trainer:
        # The evaluation comes right after the metrics, the checkpoint after the evaluation.
        trainer.wait_for(lambda event: event.type == "metrics")
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end().status == "stopped"
    assert events_of(run, "evaluation") == []
    assert [(event.data["step"], event.data["final"]) for event in events_of(run, "checkpoint")] == [(1, True)]

    assert train(run, attempt=2).status == "succeeded"
    assert [event.data["step"] for event in events_of(run, "evaluation")] == [1]
    assert [event.data["step"] for event in events_of(run, "metrics")] == [1]
    assert [event.data["step"] for event in events_of(run, "checkpoint")] == [1]


def test_a_stop_before_the_first_step_ends_soon_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    run = lora_run(tmp_path, data)
    with Trainer(run) as trainer:
        trainer.wait_for(lambda event: event.message == "starting")
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end().status == "stopped"
    assert run.complete_checkpoints() == []
    assert events_of(run, "metrics") == []
    assert not run.cache.exists()
