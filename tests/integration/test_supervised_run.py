"""Supervised fine-tuning with a tiny model: it trains as TRL does, on the assistant's tokens, and resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerBase,
)

from bento_service.errors import InvalidRequest
from bento_service.training import manifest
from bento_service.training.__main__ import main
from bento_service.training.assistant_turns import IGNORED, marking_template, tokens_by_marks, tokens_by_prefix
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.sft import require_rows_apart
from tests.tiny_model import MARKED_CHAT_TEMPLATE, make_tiny_model
from tests.trainer_run import (
    DEADLINE,
    ENVIRONMENT,
    REPOSITORY,
    Trainer,
    chat_rows,
    events_of,
    losses,
    make_run,
    train,
    write_rows,
)

ROWS, HELD_OUT, BATCH, EPOCHS = 14, 4, 2, 2
STEPS = ROWS // BATCH * EPOCHS
DROPOUT = 0.1  # uses the random state in every step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_model(folder / "model")
    make_tiny_model(folder / "marked")
    (folder / "marked" / "chat_template.jinja").write_text(MARKED_CHAT_TEMPLATE)
    rows = chat_rows(ROWS + HELD_OUT)
    write_rows(folder / "train.jsonl", rows[:ROWS])
    write_rows(folder / "held_out.jsonl", rows[ROWS:])
    return folder


def lora_run(folder: Path, data: Path) -> RunDirectory:
    return make_run(
        folder,
        data / "model",
        data / "train.jsonl",
        method="supervised",
        beta=None,
        validation_file=data / "held_out.jsonl",
        batch_size=BATCH,
        n_epochs=EPOCHS,
        lora={"dropout": DROPOUT},
        saving={"strategy": "steps", "steps": 4},
    )


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = lora_run(tmp_path_factory.mktemp("finished"), data)
    assert train(run).status == "succeeded"
    return run


def outcome_here(run: RunDirectory) -> Outcome:
    """Trained in this process, which spares the imports."""
    main([str(run.path), "--attempt", "1"])
    outcome = run.read_outcome(1)
    assert outcome is not None
    return outcome


def test_losses_and_evaluations_equal_a_plain_trl_script(data: Path, finished: RunDirectory) -> None:
    # The run's template marks no turns, the script's does: what is learned is the same.
    output = subprocess.run(
        [
            *(sys.executable, "examples/sft_script.py", str(data / "marked"), str(data / "train.jsonl")),
            *("--eval-file", str(data / "held_out.jsonl"), "--epochs", str(EPOCHS), "--batch-size", str(BATCH)),
            *("--learning-rate", "1e-3", "--lora-dropout", str(DROPOUT), "--seed", "7"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    ).stdout
    logs = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    script_losses = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert len(script_losses) == STEPS
    assert losses(finished) == pytest.approx(script_losses, rel=1e-5, abs=1e-6)
    evaluated = [event.data["eval_loss"] for event in events_of(finished, "evaluation")]
    script_evaluated = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert len(evaluated) == 1 + EPOCHS
    assert evaluated == pytest.approx(script_evaluated, rel=1e-5, abs=1e-6)
    assert evaluated[-1] < evaluated[0]


def test_a_run_stopped_and_resumed_ends_as_one_that_was_not(
    data: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    run = lora_run(tmp_path, data)
    with Trainer(run, attempt=1) as trainer:
        trainer.wait_for(lambda event: event.type == "metrics" and event.data["step"] == 2)
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end().status == "stopped"
    assert 2 <= max(losses(run)) < STEPS
    assert train(run, attempt=2).status == "succeeded"
    assert losses(run) == pytest.approx(losses(finished), rel=1e-5, abs=1e-6)
    last, expected = (events_of(each, "metrics")[-1].data["tokens"] for each in (run, finished))
    assert last == expected


def test_the_manifest_and_the_card_name_the_method(finished: RunDirectory) -> None:
    made = manifest.read(finished)
    assert made is not None
    assert (made.method, made.settings["beta"]) == ("supervised", None)
    card = (finished.complete_checkpoints()[-1] / "README.md").read_text()
    assert "# test/tiny after supervised fine-tuning" in card
    assert "token accuracy" in card


@pytest.mark.usefixtures("signals")
def test_packed_rows_do_not_see_each_other(data: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What comes after {i}? ", "completion": f"After {i} comes {i + 1}." + " Sure." * (i % 4)}
        for i in range(10)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def first_loss(name: str, **sft: bool) -> float:
        run = make_run(
            tmp_path / name,
            data / "model",
            file,
            method="supervised",
            batch_size=len(rows),  # all in one step, packed or not
            max_steps=1,
            max_length=64,
            sft=sft,
        )
        assert outcome_here(run).status == "succeeded"
        (entry,) = events_of(run, "metrics")
        tokens.append(entry.data["tokens"])
        messages.extend(event.message for event in events_of(run, "message"))
        return float(entry.data["loss"])

    tokens: list[int] = []
    messages: list[str] = []
    plain = first_loss("plain")
    packed = first_loss("packed", packing=True)
    everything = first_loss("everything", completion_only_loss=False)
    assert packed == pytest.approx(plain, rel=1e-5)
    assert everything != pytest.approx(plain, rel=1e-4)
    assert len(set(tokens)) == 1
    assert any(message.startswith("training_file: 10 rows are packed into") for message in messages)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_which_nothing_is_left_to_learn(data: Path, tmp_path: Path, packing: bool) -> None:
    run = make_run(
        tmp_path, data / "model", data / "train.jsonl", method="supervised", max_length=16, sft={"packing": packing}
    )
    outcome = outcome_here(run)
    assert (outcome.code, outcome.param) == ("invalid_dataset", "training_file")
    assert "raise max_length" in (outcome.message or "")


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(data / "model")


def test_the_assistants_turns_are_found_as_a_template_marks_them(tokenizer: PreTrainedTokenizerBase) -> None:
    assert marking_template(tokenizer) is None
    for row in chat_rows(4):
        found = tokens_by_prefix(tokenizer, row["messages"])
        assert found == tokens_by_marks(tokenizer, MARKED_CHAT_TEMPLATE, row["messages"])
        learned = [token for token, label in zip(found["input_ids"], found["labels"], strict=True) if label != IGNORED]
        replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(learned) == "".join(f"{reply}<|im_end|>\n" for reply in replies)


def test_a_template_that_changes_what_it_rendered_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    forgetful = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    forgetful.chat_template = "{% for message in messages[-2:] %}{{ message['content'] }}{% endfor %}"
    (row,) = [row for row in chat_rows(2) if len(row["messages"]) == 4]
    with pytest.raises(InvalidRequest, match="rows of prompt and completion"):
        tokens_by_prefix(forgetful, row["messages"])


def test_packing_is_refused_where_rows_would_see_each_other(data: Path) -> None:
    require_rows_apart(AutoModelForCausalLM.from_pretrained(data / "model"))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(InvalidRequest, match=r"set sft\.packing to false"):
        require_rows_apart(recurrent)
