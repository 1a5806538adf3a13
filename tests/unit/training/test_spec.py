"""Options that contradict each other are refused; defaults that depend on others are resolved."""

import pytest
from pydantic import ValidationError

from bento_service.training.spec import OptimizerOptions, TrlOptions


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, "use adamw"),
        ({"dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}}, "1 values for 2 loss types"),
        ({"dpo": {"loss_type": ["exo_pair"]}}, "label_smoothing"),
        ({"dpo": {"loss_type": ["aot"], "use_weighting": True}}, "aot"),
        ({"dpo": {"loss_type": ["nca_pair"], "f_divergence_type": "js_divergence"}}, "reverse_kl"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_contradictions_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        TrlOptions.model_validate(options)


@pytest.mark.parametrize(("name", "given", "used"), [("adamw", None, 0.01), ("adam", None, 0.0), ("sgd", 0.2, 0.2)])
def test_weight_decay(name, given, used):
    options = OptimizerOptions(name=name, weight_decay=given)
    assert options.decay == used
    assert OptimizerOptions.model_validate_json(options.model_dump_json()) == options
