"""What a trainer says when it cannot train. Runs in this process: nothing gets as far as a training step."""

import json
from pathlib import Path
from typing import Any

import pytest

from bento_service.training.__main__ import main
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.spec import MethodName
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model
from tests.trainer_run import chat_rows, events_of, make_run, preference_rows, write_rows

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", kind="qwen3")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", preference_rows(4))


def failed(run: RunDirectory) -> Outcome:
    """The outcome of a run that fails for a cause its user can mend, which is also its last event."""
    assert main([str(run.path), "--attempt", "1"]) == 1
    outcome = run.read_outcome(1)
    assert outcome is not None
    assert (outcome.status, outcome.retryable) == ("failed", False)
    last = events_of(run, "message")[-1]
    assert (last.level, last.message) == ("error", outcome.message)
    assert run.complete_checkpoints() == []
    assert not run.cache.exists()
    return outcome


def test_rows_that_cannot_be_trained_on(tmp_path: Path, model: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*preference_rows(1), {"prompt": "p", "chosen": "c"}])
    outcome = failed(make_run(tmp_path / "run", model, bad))
    assert (outcome.code, outcome.param) == ("invalid_dataset", "training_file")
    assert outcome.message is not None
    assert "row 2" in outcome.message


def test_an_empty_validation_file(tmp_path: Path, model: Path, rows: Path) -> None:
    outcome = failed(make_run(tmp_path / "run", model, rows, validation_file=write_rows(tmp_path / "empty", [])))
    assert (outcome.code, outcome.param) == ("invalid_dataset", "validation_file")


def test_a_model_that_is_nowhere(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = failed(make_run(tmp_path / "run", None, rows))
    assert (outcome.code, outcome.param) == ("model_not_found", "model")
    assert "test/tiny cannot be loaded" in (outcome.message or "")
    assert "the hub cannot be reached" in (outcome.message or "")


def test_a_model_folder_that_holds_none(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    outcome = failed(make_run(tmp_path / "run", tmp_path / "hollow", rows))
    assert outcome.code == "model_not_found"
    assert "folder in the models directory cannot be loaded" in (outcome.message or "")


def test_message_rows_for_a_model_without_a_chat_template(tmp_path: Path, rows: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    outcome = failed(make_run(tmp_path / "run", base, rows))
    assert (outcome.code, outcome.param) == ("invalid_request", "model")
    assert "no chat template" in (outcome.message or "")


@pytest.mark.parametrize(
    ("method", "template", "says"),
    [
        ("dpo", "{{ raise_exception('no system prompts') }}", "no system prompts"),
        ("supervised", "{{ raise_exception('no system prompts') }}", "no system prompts"),
        ("supervised", "nothing else", "no tokens of the assistant's"),
    ],
)
def test_a_row_that_the_chat_template_refuses(tmp_path: Path, method: MethodName, template: str, says: str) -> None:
    """It is named, by its line in the file that it is in; held-out rows count."""
    strict = make_tiny_model(tmp_path / "strict")
    (strict / "chat_template.jinja").write_text(
        f"{{% if messages[0]['role'] == 'system' %}}{template}{{% else %}}{CHAT_TEMPLATE}{{% endif %}}"
    )
    good = (preference_rows if method == "dpo" else chat_rows)(3)
    column = "prompt" if method == "dpo" else "messages"
    bad = good[0] | {column: [{"role": "system", "content": "Be brief."}, *good[0][column]]}
    lines = write_rows(tmp_path / "bad.jsonl", [*good, bad])
    lines.write_text("\n" + lines.read_text())
    run = make_run(
        tmp_path / "run", strict, write_rows(tmp_path / "good.jsonl", good), validation_file=lines, method=method,
        beta=None if method == "supervised" else 0.1,
    )  # fmt: skip
    outcome = failed(run)
    assert (outcome.code, outcome.param) == ("invalid_dataset", "validation_file")
    assert "validation_file: row 5: " in (outcome.message or "") and says in (outcome.message or "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp16"}, "fp16 trains on CUDA GPUs only"),
        ({"lora": {"target_modules": ["lm_head"]}}, "['lm_head'] cannot be adapted"),
        ({"lora": {"target_modules": ["q_proj", "query"]}}, "['query'] cannot be adapted"),
        ({"max_length": 8}, "the prompt of every pair alone has 8 tokens or more"),
        ({"max_length": 8, "tuning": "full"}, "the prompt of every pair alone has 8 tokens or more"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, model: Path, rows: Path, options: dict[str, Any], says: str) -> None:
    assert says in (failed(make_run(tmp_path / "run", model, rows, **options)).message or "")


def test_a_split_of_one_pair(tmp_path: Path, model: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", preference_rows(1))
    outcome = failed(make_run(tmp_path / "run", model, one, evaluation={"split": 0.5}))
    assert "needs at least 2 rows" in (outcome.message or "")


def test_a_loss_that_is_no_number(tmp_path: Path, model: Path, rows: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = model.parent / "nan"
    make_tiny_model(weights)
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", weights, rows)
    outcome = failed(run)
    assert outcome.code == "training_failed"
    assert "the loss became nan at step 1" in (outcome.message or "")
    assert events_of(run, "metrics")[-1].data["loss"] is None


def test_a_specification_that_cannot_be_read(tmp_path: Path, model: Path, rows: Path) -> None:
    run = make_run(tmp_path / "run", model, rows)
    spec = json.loads(run.spec_file.read_text())
    run.spec_file.write_text(json.dumps({**spec, "beta": -1}))
    outcome = failed(run)
    assert outcome.code == "internal_error"
    assert "beta" in (outcome.message or "")
