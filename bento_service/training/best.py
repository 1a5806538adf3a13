"""Comparing a run's evaluations: which was the best, and whether they have stopped getting better.

Everything is told from the Trainer's log, which a checkpoint holds, so that a resumed run decides as one that was
never stopped. Imports nothing heavy.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from bento_service.errors import InvalidRequest
from bento_service.training.spec import EvaluationOptions, MethodName

# What TRL's trainers measure in an evaluation, and whether greater is better; None: that is for the user to say.
_REWARDS: dict[str, bool | None] = {
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/margins": True,
    "logps/chosen": True,
    "logps/rejected": False,
    "logits/chosen": None,
    "logits/rejected": None,
}
METRICS: dict[MethodName, dict[str, bool | None]] = {
    "dpo": {"loss": False, "rewards/accuracies": True, **_REWARDS, "mean_token_accuracy": True, "entropy": None},
    "kto": {"loss": False, **_REWARDS, "kl": None, "entropy": None},
    "reward": {
        "loss": False,
        "accuracy": True,
        "margin": True,
        "min_reward": None,
        "mean_reward": None,
        "max_reward": None,
    },
    "supervised": {"loss": False, "mean_token_accuracy": True, "entropy": None},
}

Log = Sequence[Mapping[str, Any]]  # ``TrainerState.log_history``


class Best(BaseModel):
    """The best evaluation of those whose step has a checkpoint."""

    step: int
    metric: str = Field(description="TRL's name of what was compared.")
    value: float


def require_known(options: EvaluationOptions, method: MethodName) -> None:
    """Raises InvalidRequest for a metric that the method does not measure, or whose direction is not known."""
    known, name = METRICS[method], _plain(options.metric)
    if name not in known:
        raise InvalidRequest(
            f"evaluation.metric {options.metric!r} is not measured by {method}: use one of {', '.join(known)}.",
            param="trl.evaluation.metric",
        )
    if known[name] is None and options.greater_is_better is None:
        raise InvalidRequest(
            f"Whether a greater {name} is better is not known: say so with trl.evaluation.greater_is_better.",
            param="trl.evaluation.greater_is_better",
        )


class Comparison:
    """Compares by the metric of ``options``. Raises as ``require_known``."""

    def __init__(self, options: EvaluationOptions, method: MethodName) -> None:
        require_known(options, method)
        name = _plain(options.metric)
        given = options.greater_is_better
        greater = METRICS[method][name] if given is None else given
        self.metric = f"eval_{name}"
        self._sign = 1 if greater else -1
        self._early_stopping = options.early_stopping

    def best(self, log: Log, steps: Collection[int] | None = None) -> Best | None:
        """The best evaluation after one of ``steps`` (None: after any); of equal ones the earliest."""
        best: Best | None = None
        for step, value in self._values(log):
            wanted = steps is None or step in steps
            if wanted and math.isfinite(value) and (best is None or self._gain(value, best.value) > 0):
                best = Best(step=step, metric=self.metric, value=value)
        return best

    def ended_early(self, log: Log) -> bool:
        """Whether ``patience`` evaluations in a row were no better than the best before them by ``min_delta``.

        The evaluation before the first step counts as one of them.
        """
        if self._early_stopping is None:
            return False
        reference: float | None = None
        waited = 0
        for _, value in self._values(log):
            first = reference is None and math.isfinite(value)
            if first or (reference is not None and self._gain(value, reference) > self._early_stopping.min_delta):
                reference, waited = value, 0
            else:
                waited += 1
        return waited >= self._early_stopping.patience

    def _values(self, log: Log) -> list[tuple[int, float]]:
        """The metric after each evaluated step; of a step that was evaluated twice, the later."""
        return sorted({entry["step"]: entry[self.metric] for entry in log if self.metric in entry}.items())

    def _gain(self, value: float, reference: float) -> float:
        return self._sign * (value - reference)


def _plain(metric: str) -> str:
    return metric.removeprefix("eval_")
