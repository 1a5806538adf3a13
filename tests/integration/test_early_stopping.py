"""The best checkpoint is kept and named, and a run whose evaluations get worse ends early, also over a resume."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bento_service.training import checkpoints, manifest
from bento_service.training.__main__ import main
from bento_service.training.best import Best
from bento_service.training.run_directory import RunDirectory
from tests.tiny_model import make_tiny_model
from tests.trainer_run import chat_rows, events_of, make_run, write_rows

PLANNED, PATIENCE = 12, 3


@pytest.fixture(scope="module", autouse=True)
def signals() -> Iterator[None]:
    """A trainer in this process takes over these signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that ended early: the loss falls, and it is asked for the greatest."""
    folder = tmp_path_factory.mktemp("stopped")
    make_tiny_model(folder / "model")
    rows = chat_rows(8)
    run = make_run(
        folder / "run",
        folder / "model",
        write_rows(folder / "train.jsonl", rows[:4]),
        method="supervised",
        validation_file=write_rows(folder / "held_out.jsonl", rows[4:]),
        batch_size=4,
        n_epochs=PLANNED,
        learning_rate=0.01,
        evaluation={
            "strategy": "steps",
            "steps": 1,
            "before_training": False,
            "greater_is_better": True,
            "early_stopping": {"patience": PATIENCE},
        },
        saving={"strategy": "end", "best": True, "total_limit": 1},
        scheduler={"warmup_steps": 3},
    )
    assert main([str(run.path), "--attempt", "1"]) == 0
    return run


def copy_of(run: RunDirectory, folder: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(run.path, folder / "run")))


def evaluated(run: RunDirectory) -> dict[int, float]:
    return {event.data["step"]: event.data["eval_loss"] for event in events_of(run, "evaluation")}


def kept(run: RunDirectory) -> list[int]:
    return [checkpoints.step_of(path) for path in run.complete_checkpoints()]


def final_steps(run: RunDirectory) -> list[int]:
    return [event.data["step"] for event in events_of(run, "checkpoint") if event.data["final"]]


def test_a_run_ends_when_evaluations_stop_getting_better_and_keeps_the_best(stopped: RunDirectory) -> None:
    values = evaluated(stopped)
    best = max(values, key=lambda step: values[step])
    last = best + PATIENCE
    assert list(values) == list(range(1, last + 1))
    assert last < PLANNED
    outcome = stopped.read_outcome(1)
    assert outcome is not None
    assert outcome.status == "succeeded"
    assert kept(stopped) == [best, last]
    assert final_steps(stopped) == [last]
    expected = Best(step=best, metric="eval_loss", value=values[best])
    reported = [event.data["best"] for event in events_of(stopped, "message") if "best" in event.data]
    assert reported[-1] == expected.model_dump()
    made = manifest.read(stopped)
    assert made is not None
    assert made.metrics.best == expected
    assert any("stopping early after step" in event.message for event in events_of(stopped, "message"))


def test_a_run_killed_on_the_way_ends_at_the_same_step(stopped: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path)
    best, last = kept(run)
    checkpoints.remove(run.checkpoints / f"checkpoint-{last}")
    assert main([str(run.path), "--attempt", "2"]) == 0
    assert kept(run) == [best, last]
    assert evaluated(run) == pytest.approx(evaluated(stopped), rel=1e-5)
    assert max(event.data["step"] for event in events_of(run, "metrics")) == last


def test_an_evaluation_that_is_made_up_for_can_end_the_training(stopped: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path)
    last = kept(run)[-1]
    newest = run.complete_checkpoints()[-1]
    # As a stop during the last evaluation leaves it.
    state_file = newest / "trainer_state.json"
    state = json.loads(state_file.read_bytes())
    state["log_history"] = [
        entry for entry in state["log_history"] if not (entry["step"] == last and "eval_loss" in entry)
    ]
    state_file.write_text(json.dumps(state))
    checkpoints.complete(newest, step=last, epoch=float(last), tokens=1, final=False)

    assert main([str(run.path), "--attempt", "2"]) == 0
    assert kept(run)[-1] == last
    assert final_steps(run) == [last, last]
    assert [event.data["step"] for event in events_of(run, "evaluation")].count(last) == 2
    assert [event.data["step"] for event in events_of(run, "metrics")].count(last) == 1
