"""The callbacks' decisions, one by one. No unit tests, because transformers takes seconds to load."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from bento_service.training.best import Comparison
from bento_service.training.callbacks import AlreadyTrained, ScheduleCallback
from bento_service.training.schedule import Schedule
from bento_service.training.spec import EvaluationOptions, SavingOptions
from bento_service.training.stop import StopRequested, StopSwitch

SCHEDULE = Schedule(
    total_steps=10,
    steps_per_epoch=5,
    evaluation=EvaluationOptions(strategy="steps", steps=4),
    saving=SavingOptions(strategy="epoch"),
)


COMPARISON = Comparison(EvaluationOptions(), "dpo")


@pytest.fixture
def stop() -> StopSwitch:
    return StopSwitch()


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def after_step(step: int, stop: StopSwitch, args: TrainingArguments) -> tuple[bool, bool, bool, bool]:
    """What is asked for after a step: log, evaluate, save, stop."""
    control = TrainerControl()
    ScheduleCallback(SCHEDULE, COMPARISON, stop).on_step_end(
        args, TrainerState(log_history=[], global_step=step), control
    )
    return control.should_log, control.should_evaluate, control.should_save, control.should_training_stop


def test_steps_are_evaluated_and_saved_as_scheduled(stop: StopSwitch, args: TrainingArguments) -> None:
    assert after_step(3, stop, args) == (False, False, False, False)
    assert after_step(4, stop, args) == (False, True, False, False)
    assert after_step(5, stop, args) == (False, False, True, False)
    assert after_step(10, stop, args) == (True, True, True, False)


def test_a_stop_logs_and_saves_the_step_that_ended(stop: StopSwitch, args: TrainingArguments) -> None:
    stop.requested = True
    assert after_step(3, stop, args) == (True, False, True, True)


def test_a_stop_while_evaluating_leaves_the_evaluation(stop: StopSwitch, args: TrainingArguments) -> None:
    callback = ScheduleCallback(SCHEDULE, COMPARISON, stop)
    callback.on_prediction_step(args, TrainerState(), TrainerControl())
    stop.requested = True
    with pytest.raises(StopRequested):
        callback.on_prediction_step(args, TrainerState(), TrainerControl())


def test_a_stop_after_an_evaluation_or_while_saving_makes_no_further_step(
    stop: StopSwitch, args: TrainingArguments
) -> None:
    callback = ScheduleCallback(SCHEDULE, COMPARISON, stop)
    stop.requested = True
    evaluated, saved = TrainerControl(), TrainerControl()
    callback.on_evaluate(args, TrainerState(log_history=[], global_step=4), evaluated)
    callback.on_save(args, TrainerState(log_history=[], global_step=5), saved)
    assert (evaluated.should_save, evaluated.should_training_stop) == (True, True)
    assert (saved.should_save, saved.should_training_stop) == (False, True)


def test_an_epoch_begins_only_when_there_is_a_step_to_make(stop: StopSwitch, args: TrainingArguments) -> None:
    callback = ScheduleCallback(SCHEDULE, COMPARISON, stop)
    callback.on_epoch_begin(args, TrainerState(log_history=[], global_step=9), TrainerControl())
    with pytest.raises(AlreadyTrained):
        callback.on_epoch_begin(args, TrainerState(log_history=[], global_step=10), TrainerControl())
    stop.requested = True
    with pytest.raises(StopRequested):
        callback.on_epoch_begin(args, TrainerState(log_history=[], global_step=5), TrainerControl())
