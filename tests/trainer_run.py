"""Run directories for trainer tests: specification in, process started, events read back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bento_service.training.events import TrainerEvent, read_events
from bento_service.training.run_directory import Outcome, RunDirectory
from bento_service.training.spec import MethodName, TrainingSpec, TrlOptions

REPOSITORY = Path(__file__).parent.parent
DEADLINE = 180.0  # seconds for any one thing a trainer does; imports alone can take 30 on busy cores
# OMP_WAIT_POLICY is what a trainer sets for itself; the plain script it is compared with shares busy cores too.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Pairs of messages of different lengths, so that batches are padded."""
    return [
        {
            "prompt": [
                {"role": "user", "content": "Please answer briefly: what is the number " * (1 + i % 3) + f"{i}?"}
            ],
            "chosen": [{"role": "assistant", "content": f"It is {i}." + " Thank you." * (i % 4)}],
            "rejected": [{"role": "assistant", "content": "It depends." * (1 + i % 5) + f" Why ask about {i}?"}],
        }
        for i in range(count)
    ]


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two turns of the assistant's, of different lengths."""
    rows = []
    for i, pair in enumerate(preference_rows(count)):
        messages = pair["prompt"] + pair["chosen"]
        if i % 2:
            messages += [{"role": "user", "content": "Are you sure?"}, {"role": "assistant", "content": f"Yes, {i}."}]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(
    folder: Path,
    model: Path | None,
    training_file: Path,
    *,
    validation_file: Path | None = None,
    method: MethodName = "dpo",
    seed: int = 7,
    beta: float | None = 0.1,
    batch_size: int = 2,
    n_epochs: int = 1,
    learning_rate: float = 1e-3,
    **options: Any,
) -> RunDirectory:
    run = RunDirectory(folder)
    run.write_spec(
        TrainingSpec(
            job_id="ftjob-test",
            method=method,
            model="test/tiny",
            model_path=None if model is None else str(model),
            training_file=str(training_file),
            validation_file=None if validation_file is None else str(validation_file),
            seed=seed,
            beta=beta,
            batch_size=batch_size,
            n_epochs=n_epochs,
            learning_rate=learning_rate,
            device="cpu",
            options=TrlOptions.model_validate(options),
        )
    )
    return run


class Trainer:
    """One attempt in a process of its own; ended when the block is left."""

    def __init__(self, run: RunDirectory, attempt: int = 1) -> None:
        self.run = run
        self.attempt = attempt

    def __enter__(self) -> "Trainer":
        self._log = self.run.log_file.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bento_service.training", str(self.run.path), "--attempt", str(self.attempt)],
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def wait_for(self, wanted: Callable[[TrainerEvent], bool]) -> TrainerEvent:
        """The first event of any attempt that is wanted; fails when the process ends without it."""
        deadline = time.monotonic() + DEADLINE
        offset = 0
        while True:
            alive = self.process.poll() is None
            events, offset = read_events(self.run.events_file, offset)
            for event in events:
                if wanted(event):
                    return event
            assert alive, f"the trainer ended without the event: {self.run.log_tail()}"
            assert time.monotonic() < deadline, f"no such event in {DEADLINE} s: {self.run.log_tail()}"
            time.sleep(0.002)

    def end(self) -> Outcome:
        """The outcome of the attempt, after its process has ended by itself."""
        status = self.process.wait(DEADLINE)
        outcome = self.run.read_outcome(self.attempt)
        assert outcome is not None, f"exit status {status} without an outcome: {self.run.log_tail()}"
        assert status == (1 if outcome.status == "failed" else 0)
        return outcome


def train(run: RunDirectory, attempt: int = 1) -> Outcome:
    with Trainer(run, attempt) as trainer:
        return trainer.end()


def events_of(run: RunDirectory, type: str) -> list[TrainerEvent]:
    """All events of one type, after checking that the numbering has no gaps."""
    events: list[TrainerEvent] = []
    offset = 0
    while True:
        batch, end = read_events(run.events_file, offset)
        if end == offset:
            break
        events, offset = events + batch, end
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event for event in events if event.type == type]


def losses(run: RunDirectory) -> dict[int, float]:
    """Loss by step; of a step that two attempts made, the later one's."""
    return {event.data["step"]: event.data["loss"] for event in events_of(run, "metrics")}
