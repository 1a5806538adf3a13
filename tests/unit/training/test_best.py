"""Evaluations are compared as asked for: which was the best, and when they have stopped getting better."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from bento_service.errors import InvalidRequest
from bento_service.training.best import Best, Comparison
from bento_service.training.spec import EvaluationOptions


def comparison(**options: Any) -> Comparison:
    return Comparison(EvaluationOptions.model_validate(options), "dpo")


def log(*values: float, metric: str = "eval_loss") -> list[dict[str, float]]:
    """Evaluations after steps 0, 10, 20, ..., each after a step's metrics."""
    entries: list[dict[str, float]] = []
    for step, value in enumerate(values):
        entries += [{"step": 10 * step, "loss": 0.0}, {"step": 10 * step, metric: value}]
    return entries


def test_the_smallest_loss_and_the_greatest_accuracy_are_best() -> None:
    assert comparison().best(log(0.7, 0.5, 0.6)) == Best(step=10, metric="eval_loss", value=0.5)
    accuracy = comparison(metric="eval_rewards/accuracies")
    assert accuracy.best(log(0.7, 0.5, 0.9, metric="eval_rewards/accuracies")) == Best(
        step=20, metric="eval_rewards/accuracies", value=0.9
    )
    upside_down = comparison(greater_is_better=True)
    assert upside_down.best(log(0.7, 0.5)) == Best(step=0, metric="eval_loss", value=0.7)


def test_only_the_steps_asked_for_count_and_the_earliest_of_equal_ones() -> None:
    assert comparison().best(log(0.1, 0.5, 0.4, 0.4), {10, 20, 30}) == Best(step=20, metric="eval_loss", value=0.4)
    assert comparison().best(log(0.1), {10}) is None
    assert comparison().best(log(math.nan, 0.9)) == Best(step=10, metric="eval_loss", value=0.9)


def test_a_step_evaluated_again_has_its_later_value() -> None:
    assert comparison().best([*log(0.7, 0.5), {"step": 10, "eval_loss": 0.6}]) == Best(
        step=10, metric="eval_loss", value=0.6
    )


@pytest.mark.parametrize(
    ("values", "ended"),
    [
        ((0.7, 0.6, 0.61), False),
        ((0.7, 0.6, 0.61, 0.6), True),
        ((0.7, 0.6, 0.61, 0.59), False),
        ((0.5, 0.6, 0.7), True),  # worse than before training
        ((0.7, math.nan, math.nan), True),
        ((math.nan, 0.7), False),
        ((), False),
    ],
)
def test_patience_is_counted_in_evaluations_since_the_best(values: tuple[float, ...], ended: bool) -> None:
    assert comparison(early_stopping={"patience": 2}).ended_early(log(*values)) is ended
    assert not comparison().ended_early(log(*values))


def test_gains_below_min_delta_do_not_count_however_many() -> None:
    slow = log(0.7, 0.68, 0.66, 0.64)
    assert comparison(early_stopping={"patience": 3, "min_delta": 0.1}).ended_early(slow)
    assert not comparison(early_stopping={"patience": 3, "min_delta": 0.05}).ended_early(slow)


@pytest.mark.parametrize(
    ("options", "param"),
    [({"metric": "accuracy"}, "trl.evaluation.metric"), ({"metric": "entropy"}, "trl.evaluation.greater_is_better")],
)
def test_a_metric_that_cannot_be_compared_is_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        comparison(**options)
    assert refused.value.param == param
    assert comparison(metric="entropy", greater_is_better=False).best(log(0.5, metric="eval_entropy")) is not None


def test_early_stopping_without_evaluations_while_training_is_refused() -> None:
    with pytest.raises(ValidationError, match="use epoch or steps"):
        EvaluationOptions.model_validate({"strategy": "end", "early_stopping": {}})
