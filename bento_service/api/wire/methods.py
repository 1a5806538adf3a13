"""Methods of training and their hyperparameters, as they are asked for and as they are answered.

A new method is a class with its hyperparameters, and a field of ``Method`` named as in ``spec.MethodName``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from bento_service.api.wire.base import Strict
from bento_service.training.spec import MethodName


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


def _none_is_auto(value: float | None) -> Any:
    return "auto" if value is None else value


def _auto_or(kind: str, **bounds: float) -> tuple[Any, ...]:
    auto, number = {"type": "string", "const": "auto"}, {"type": kind, **bounds}
    return (
        BeforeValidator(_auto_is_none),
        PlainSerializer(_none_is_auto),
        WithJsonSchema({"anyOf": [auto, number, {"type": "null"}]}, mode="validation"),
        WithJsonSchema({"anyOf": [auto, number]}, mode="serialization"),
    )


AutoInteger = Annotated[int | None, *_auto_or("integer", minimum=1)]
AutoNumber = Annotated[float | None, *_auto_or("number", exclusiveMinimum=0)]


class SupervisedHyperparameters(Strict):
    """Hyperparameters of every method; "auto", null and absence mean the same.

    A job is answered with the values that it trains with: only ``learning_rate_multiplier`` stays "auto" there, and
    `trl.resolved.learning_rate` has the rate.
    """

    batch_size: AutoInteger = Field(default=None, ge=1, description="Rows per forward pass. auto: 8.")
    learning_rate_multiplier: AutoNumber = Field(
        default=None, gt=0, description="Times the method's default learning rate. auto: 1."
    )
    n_epochs: AutoInteger = Field(default=None, ge=1, description="Passes over the training data. auto: 1.")

    def chosen(self) -> dict[str, Any]:
        """The values under the names that ``JobRequest`` has; None is "auto"."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class DpoHyperparameters(SupervisedHyperparameters):
    """Those of every method, and beta."""

    beta: AutoNumber = Field(
        default=None, gt=0, description="Strength of the pull towards the reference model. auto: 0.1."
    )


class KtoHyperparameters(DpoHyperparameters):
    """The same as DPO's; auto for beta is 0.1 here, too."""


class DpoMethod(Strict):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class KtoMethod(Strict):
    hyperparameters: KtoHyperparameters = KtoHyperparameters()


class RewardMethod(Strict):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class SupervisedMethod(Strict):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class Method(Strict):
    """How to train: the method's name, and under that name its hyperparameters."""

    type: MethodName = Field(description="Name of the method.")
    dpo: DpoMethod | None = Field(default=None, exclude_if=lambda value: value is None)
    supervised: SupervisedMethod | None = Field(default=None, exclude_if=lambda value: value is None)
    kto: KtoMethod | None = Field(default=None, exclude_if=lambda value: value is None)
    reward: RewardMethod | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _one_method(self) -> "Method":
        others = [name for name in get_args(MethodName) if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(
                f"the type is {self.type}, and there are settings of {' and '.join(others)}: leave them out, or "
                "change the type"
            )
        return self

    @property
    def hyperparameters(self) -> SupervisedHyperparameters:
        """Those of the type; all "auto" when none are given."""
        chosen = getattr(self, self.type)
        kind: type[SupervisedHyperparameters] = _hyperparameters_of(self.type)
        return kind() if chosen is None else chosen.hyperparameters

    @classmethod
    def of(cls, name: MethodName, values: Mapping[str, Any]) -> "Method":
        """The method with those of ``values`` that are its hyperparameters."""
        chosen = {key: values[key] for key in _hyperparameters_of(name).model_fields}
        return cls.model_validate({"type": name, name: {"hyperparameters": chosen}})


def _hyperparameters_of(name: MethodName) -> type[SupervisedHyperparameters]:
    group = next(kind for kind in get_args(Method.model_fields[name].annotation))
    kind = group.model_fields["hyperparameters"].annotation
    assert issubclass(kind, SupervisedHyperparameters)
    return kind
