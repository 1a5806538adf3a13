"""What hangs on transformers' Trainer: the schedule, the stop, and the events."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bento_service.errors import TrainingFailed
from bento_service.training import checkpoints, manifest, model_card
from bento_service.training.best import Best, Comparison
from bento_service.training.events import EventWriter
from bento_service.training.run_directory import RunDirectory
from bento_service.training.schedule import Schedule
from bento_service.training.stop import StopRequested, StopSwitch
from bento_service.training.throughput import Meter

# Keys of a training log that the events give under other names, or that transformers counts per attempt.
NOT_METRICS = {"epoch", "num_tokens", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"}

# What an evaluation's message says, of the values that its method has.
SHOWN_VALUES = {
    "eval_loss": "loss",
    "eval_mean_token_accuracy": "token accuracy",
    "eval_rewards/accuracies": "reward accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_accuracy": "accuracy",
    "eval_margin": "margin",
}


class AlreadyTrained(Exception):
    """A resumed run whose last step is done: only an evaluation was missing, or nothing."""


class ScheduleCallback(TrainerCallback):
    """Asks the Trainer to evaluate, save and stop; the Trainer's own strategies are off.

    On a stop the checkpoint is of the step that has just ended. An evaluation under way is left by StopRequested:
    it can take long, and is made up for when the run is resumed. Evaluations that stopped getting better end the
    training as its last step would.
    """

    def __init__(self, schedule: Schedule, comparison: Comparison, stop: StopSwitch) -> None:
        self._schedule = schedule
        self._comparison = comparison
        self._stop = stop

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer would make one more step when it resumes after the last one in mid-epoch.
        if state.global_step >= self._schedule.total_steps or self._comparison.ended_early(state.log_history):
            raise AlreadyTrained
        # After an evaluation before the first step, or a signal that came while the Trainer was getting ready.
        if self._stop.agreed():
            raise StopRequested

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        control.should_evaluate = self._schedule.evaluates_after(step)
        control.should_save = self._schedule.saves_after(step)
        if step == self._schedule.total_steps:
            control.should_log = True
        if self._stop.agreed():
            control.should_log = True
            self._save_and_stop(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stop.agreed():
            raise StopRequested

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = self._comparison.best(state.log_history)
        if self._schedule.saving.best and best is not None and best.step == state.global_step > 0:
            control.should_save = True
        if self._stop.agreed() or self._comparison.ended_early(state.log_history):
            self._save_and_stop(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Of several ranks this also waits until each has written its part of the checkpoint.
        if self._stop.agreed():
            control.should_training_stop = True

    def _save_and_stop(self, control: TrainerControl) -> None:
        control.should_save = True
        control.should_training_stop = True


class EventsCallback(TrainerCallback):
    """Writes the run's events, and completes its checkpoints before it reports them.

    Raises TrainingFailed when the loss stops being a number.
    """

    def __init__(
        self, events: EventWriter, run: RunDirectory, schedule: Schedule, comparison: Comparison, meter: Meter
    ) -> None:
        self._events = events
        self._run = run
        self._schedule = schedule
        self._comparison = comparison
        self._meter = meter
        self._best: Best | None = None  # as reported last
        self._started = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._report_progress(state)
        self._report_best(state)  # an earlier attempt may have been killed before it did
        self._meter.restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Once more when an evaluation came first: the remaining time is reckoned from the newest progress event.
        if not self._started and args.eval_on_start:
            self._report_progress(state)
        self._started = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter.step_ended()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        metrics: dict[str, Any] = {key: value for key, value in logs.items() if key not in NOT_METRICS}
        metrics |= self._meter.read()
        self._events.write(
            "metrics",
            f"step {state.global_step}/{self._schedule.total_steps}: loss {logs['loss']:.4f}",
            **self._position(state),
            tokens=state.num_input_tokens_seen,
            **metrics,
        )
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(
                f"the loss became {logs['loss']} at step {state.global_step}: "
                "lower the learning rate, or train in fp32 or bf16 instead of fp16",
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        values: dict[str, Any] = {key: value for key, value in (metrics or {}).items() if key.startswith("eval_")}
        values.pop("eval_num_tokens", None)  # TRL's count of trained tokens, not of evaluated ones
        self._events.write(
            "evaluation",
            f"evaluation after step {state.global_step}: "
            + ", ".join(f"{name} {values[key]:.4f}" for key, name in SHOWN_VALUES.items() if key in values),
            **self._position(state),
            **values,
        )
        if self._comparison.ended_early(state.log_history) and state.global_step < self._schedule.total_steps:
            best = self._comparison.best(state.log_history)
            self._events.write(
                "message",
                f"stopping early after step {state.global_step} of {self._schedule.total_steps}: "
                f"{self._comparison.metric} has stopped getting better"
                + (f"; it was best after step {best.step}, {best.value:.4f}" if best else ""),
            )
        self._report_best(state)  # of an evaluation that is made up for, the checkpoint is there already
        self._meter.restart()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        about = manifest.describe(self._run)
        checkpoints.name_base_model(checkpoint, about.base_model)
        (checkpoint / "README.md").write_text(model_card.write(about), encoding="utf-8")
        saved = checkpoints.complete(
            checkpoint,
            step=state.global_step,
            epoch=state.epoch or 0.0,
            tokens=state.num_input_tokens_seen,
            final=state.global_step == self._schedule.total_steps or self._comparison.ended_early(state.log_history),
            about=about.model_dump(mode="json", exclude={"checkpoint"}),
        )
        checkpoints.report(self._events, checkpoint, saved)
        self._report_best(state)
        best = None if self._best is None else self._best.step
        limit = self._schedule.saving.total_limit
        for removed in checkpoints.remove_oldest(self._run, keep=limit, best=best):
            self._events.write(
                "message",
                f"{removed.name} deleted: the newest {limit} are kept" + (", and the best" if best else ""),
                removed=str(removed),
            )
        self._meter.restart()

    def _report_best(self, state: TrainerState) -> None:
        """Say which checkpoint is the best, when that is another one than was said last."""
        saved = {checkpoints.step_of(path) for path in self._run.complete_checkpoints()}
        best = self._comparison.best(state.log_history, saved)
        if best is not None and best != self._best:
            self._events.write(
                "message",
                f"checkpoint-{best.step} is the best so far: {best.metric} {best.value:.4f}",
                best=best.model_dump(),
            )
            self._best = best

    def _report_progress(self, state: TrainerState) -> None:
        self._events.write(
            "progress",
            f"step {state.global_step} of {self._schedule.total_steps}",
            **self._position(state),
            tokens=state.num_input_tokens_seen,
        )

    def _position(self, state: TrainerState) -> dict[str, Any]:
        return {
            "step": state.global_step,
            "total_steps": self._schedule.total_steps,
            "epoch": state.epoch or 0.0,
        }
