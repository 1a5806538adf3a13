"""Training with one of TRL's trainers from the run's newest checkpoint on, until it is done or told to stop."""

import json
from pathlib import Path
from typing import Literal

from bento_service.training.best import Comparison
from bento_service.training.callbacks import AlreadyTrained, EventsCallback, ScheduleCallback
from bento_service.training.checkpoints import read_manifest, step_of
from bento_service.training.events import EventWriter
from bento_service.training.lora import resume_as_saved
from bento_service.training.rank import first_says
from bento_service.training.run_directory import RunDirectory
from bento_service.training.schedule import Schedule
from bento_service.training.spec import TrainingSpec
from bento_service.training.stop import StopRequested, StopSwitch
from bento_service.training.throughput import CountingTrainer, Meter


def train(
    trainer: CountingTrainer, spec: TrainingSpec, run: RunDirectory, events: EventWriter, stop: StopSwitch
) -> Literal["succeeded", "stopped"]:
    """Train as ``_train``; of several ranks all are done when the last one is."""
    status = _train(trainer, spec, run, events, stop)
    stop.agreed()
    return status


def _train(
    trainer: CountingTrainer, spec: TrainingSpec, run: RunDirectory, events: EventWriter, stop: StopSwitch
) -> Literal["succeeded", "stopped"]:
    """Train as scheduled, or until evaluations stop getting better, reporting through ``events``.

    Returns "stopped" when a stop was requested before the last step and its evaluation were done. Raises
    TrainingFailed.
    """
    schedule = Schedule.of(spec, rows=len(trainer.train_dataset), evaluated=trainer.eval_dataset is not None)
    trainer.args.max_steps = schedule.total_steps
    comparison = Comparison(spec.options.evaluation, spec.method)
    meter = Meter(trainer, spec)
    reporter = EventsCallback(events, run, schedule, comparison, meter)
    trainer.add_callback(ScheduleCallback(schedule, comparison, stop))
    if trainer.is_world_process_zero():
        trainer.add_callback(reporter)

    complete = run.complete_checkpoints()
    checkpoint = complete[-1] if complete else None
    if checkpoint is None:
        trainer.args.eval_on_start = schedule.evaluates_before
    else:
        events.write("message", f"continuing from {checkpoint.name}")
        trainer.args.eval_on_start = misses_evaluation(checkpoint, schedule)

    if checkpoint is not None and spec.options.tuning == "lora":
        resume_as_saved(trainer.model)

    stop.defer()
    if stop.agreed():
        return "stopped"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except AlreadyTrained:
        if trainer.is_world_process_zero() and checkpoint is not None and not read_manifest(checkpoint).final:
            # The evaluation that a stop had left out was the one that ends the training.
            reporter.on_save(trainer.args, trainer.state, trainer.control)
        return "succeeded"
    except StopRequested:
        # Between two steps, or out of an evaluation: what the last step left may not be saved yet.
        step = trainer.state.global_step
        if first_says(step > 0 and step not in map(step_of, run.complete_checkpoints())):
            trainer._save_checkpoint(trainer.model, trial=None)
            stop.agreed()  # once all ranks have written their part
            if trainer.is_world_process_zero():
                reporter.on_save(trainer.args, trainer.state, trainer.control)
        return "stopped"
    state = trainer.state
    done = state.global_step >= schedule.total_steps or comparison.ended_early(state.log_history)
    return "succeeded" if done else "stopped"


def misses_evaluation(checkpoint: Path, schedule: Schedule) -> bool:
    """Whether a stop left out the evaluation that was due after the checkpoint's step."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    step = state["global_step"]
    done = any("eval_loss" in entry and entry["step"] == step for entry in state["log_history"])
    return schedule.evaluates_after(step) and not done
