"""After which optimizer steps a run is evaluated and saved."""

import math
from dataclasses import dataclass

from bento_service.training.spec import EvaluationOptions, SavingOptions, TrainingSpec


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``evaluation`` is None when there are no rows to evaluate on."""

    total_steps: int
    steps_per_epoch: int
    evaluation: EvaluationOptions | None
    saving: SavingOptions

    @classmethod
    def of(cls, spec: TrainingSpec, *, rows: int, evaluated: bool) -> "Schedule":
        """The schedule of a run over ``rows`` training rows.

        An epoch is all batches of the data in groups of gradient_accumulation_steps (the last group may be smaller,
        as in transformers), or max_steps_per_epoch steps if that is less.
        """
        options = spec.options
        batches = math.ceil(rows / spec.batch_size)
        steps_per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        if options.max_steps_per_epoch is not None:
            steps_per_epoch = min(steps_per_epoch, options.max_steps_per_epoch)
        total_steps = spec.n_epochs * steps_per_epoch
        if options.max_steps is not None:
            total_steps = min(total_steps, options.max_steps)
        wanted = evaluated and options.evaluation.strategy != "none"
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            evaluation=options.evaluation if wanted else None,
            saving=options.saving,
        )

    @property
    def evaluates_before(self) -> bool:
        """Whether there is an evaluation before the first step."""
        return self.evaluation is not None and self.evaluation.before_training

    def evaluates_after(self, step: int) -> bool:
        if self.evaluation is None:
            return False
        return step == self.total_steps or self._falls(step, self.evaluation.strategy, self.evaluation.steps)

    def saves_after(self, step: int) -> bool:
        return step == self.total_steps or self._falls(step, self.saving.strategy, self.saving.steps)

    def _falls(self, step: int, strategy: str, steps: int) -> bool:
        if strategy == "epoch":
            return step % self.steps_per_epoch == 0
        return strategy == "steps" and step % steps == 0
