"""Which recipe trains which method. Imports nothing heavy, so that a request can be checked against it."""

from bento_service.training.spec import MethodName

# Method of a specification -> module with the recipe, a function run(spec, run, events, stop).
RECIPES: dict[MethodName, str] = {
    "dpo": "bento_service.training.dpo",
    "supervised": "bento_service.training.sft",
    "kto": "bento_service.training.kto",
    "reward": "bento_service.training.reward",
}
