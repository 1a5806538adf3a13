"""When a run is evaluated and saved."""

from pathlib import Path
from typing import Any

import pytest

from bento_service.training.schedule import Schedule
from bento_service.training.spec import TrainingSpec, TrlOptions


def schedule(
    pairs: int = 20, *, evaluated: bool = True, batch_size: int = 4, n_epochs: int = 2, **options: Any
) -> Schedule:
    spec = TrainingSpec(
        job_id="job",
        method="dpo",
        model="org/model",
        model_path=None,
        training_file=str(Path("train.jsonl")),
        validation_file=None,
        seed=1,
        beta=0.1,
        batch_size=batch_size,
        n_epochs=n_epochs,
        learning_rate=1e-5,
        device="cpu",
        options=TrlOptions.model_validate(options),
    )
    return Schedule.of(spec, rows=pairs, evaluated=evaluated)


@pytest.mark.parametrize(
    ("settings", "per_epoch", "total"),
    [
        ({}, 5, 10),
        ({"pairs": 21}, 6, 12),
        ({"gradient_accumulation_steps": 2}, 3, 6),
        ({"max_steps_per_epoch": 3}, 3, 6),
        ({"max_steps_per_epoch": 30}, 5, 10),
        ({"max_steps": 7}, 5, 7),
        ({"max_steps": 70}, 5, 10),
        ({"max_steps": 4, "max_steps_per_epoch": 3}, 3, 4),
        ({"pairs": 1, "n_epochs": 1}, 1, 1),
    ],
)
def test_steps_are_counted_as_transformers_counts_them(settings: dict[str, Any], per_epoch: int, total: int) -> None:
    made = schedule(**settings)
    assert (made.steps_per_epoch, made.total_steps) == (per_epoch, total)


def evaluated_steps(made: Schedule) -> list[int]:
    return [step for step in range(1, made.total_steps + 1) if made.evaluates_after(step)]


def saved_steps(made: Schedule) -> list[int]:
    return [step for step in range(1, made.total_steps + 1) if made.saves_after(step)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"strategy": "epoch"}, [5, 10]),
        ({"strategy": "steps", "steps": 4}, [4, 8, 10]),
        ({"strategy": "end"}, [10]),
        ({"strategy": "none"}, []),
    ],
)
def test_evaluation_follows_its_strategy_and_the_last_step(strategy: dict[str, Any], expected: list[int]) -> None:
    assert evaluated_steps(schedule(evaluation=strategy)) == expected


def test_nothing_is_evaluated_without_pairs_to_evaluate_on() -> None:
    made = schedule(evaluated=False)
    assert not made.evaluates_before
    assert evaluated_steps(made) == []


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [({}, True), ({"before_training": False}, False), ({"strategy": "none"}, False)],
)
def test_the_evaluation_before_training_can_be_left_out(evaluation: dict[str, Any], expected: bool) -> None:
    assert schedule(evaluation=evaluation).evaluates_before is expected


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"strategy": "epoch"}, [5, 10]),
        ({"strategy": "steps", "steps": 3}, [3, 6, 9, 10]),
        ({"strategy": "end"}, [10]),
    ],
)
def test_the_last_step_is_always_saved(strategy: dict[str, Any], expected: list[int]) -> None:
    assert saved_steps(schedule(saving=strategy)) == expected


def test_a_capped_epoch_ends_at_its_cap() -> None:
    assert saved_steps(schedule(max_steps_per_epoch=2)) == [2, 4]
