"""What an algorithm_config asks of the training service: DPO's beta, and TRL options."""

from dataclasses import dataclass, field
from typing import Any

from .checks import above_zero, at_least_one, finite
from .errors import NotSupported, RequestRefused
from .protocol import (
    DPOAlignmentConfig,
    LoraFinetuningConfig,
    QATFinetuningConfig,
    RewardAlignmentConfig,
)

DPO_LOSSES = ("sigmoid", "hinge", "ipo")  # of Llama Stack's DPOLossType; kto_pair is no loss of TRL's DPO any more
# Llama Stack's names are torchtune's (torchtune.models.llama3_1.lora_llama3_1); the service takes Hugging Face's.
ATTENTION_MODULES = {"output_proj": "o_proj"}
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
OUTPUT_MODULES = ("lm_head",)

AlgorithmConfig = DPOAlignmentConfig | RewardAlignmentConfig | LoraFinetuningConfig | QATFinetuningConfig


@dataclass(frozen=True)
class Algorithm:
    beta: float | None = None  # None: the provider's default
    options: dict[str, Any] = field(default_factory=dict)  # of the service's ``trl`` object


def algorithm_of(config: AlgorithmConfig | None) -> Algorithm:
    """Raises RequestRefused for values that cannot be trained with, NotSupported for what the service has not."""
    match config:
        case None:
            return Algorithm()
        case DPOAlignmentConfig():
            return _dpo(config)
        case RewardAlignmentConfig():
            return _reward(config)
        case LoraFinetuningConfig():
            return Algorithm(options={"tuning": "lora", "lora": _lora(config)})
        case QATFinetuningConfig():
            raise NotSupported(
                "algorithm_config.type QAT: the training service has no quantization-aware training; use type LoRA, "
                "or leave algorithm_config out"
            )


def _dpo(config: DPOAlignmentConfig) -> Algorithm:
    beta = None if config.beta is None else above_zero("algorithm_config.beta", config.beta)
    if config.loss_type is None:
        return Algorithm(beta)
    if config.loss_type not in DPO_LOSSES:
        raise RequestRefused(
            f"algorithm_config.loss_type {config.loss_type!r} is no DPO loss of TRL: use one of "
            f"{', '.join(DPO_LOSSES)}, or name another of TRL's losses with hyperparam_search_config "
            '{"dpo": {"loss_type": [...]}}'
        )
    return Algorithm(beta, {"dpo": {"loss_type": [config.loss_type]}})


def _reward(config: RewardAlignmentConfig) -> Algorithm:
    """DPO's implicit reward is beta times the log-ratio (Rafailov et al. 2023, eq. 5): its scale is beta. Label
    smoothing is the epsilon of conservative DPO (Mitchell 2023)."""
    beta = above_zero("algorithm_config.reward_scale", config.reward_scale)
    if config.reward_clip != 0:
        raise RequestRefused(
            f"algorithm_config.reward_clip is {config.reward_clip}, but DPO does not clip rewards: send 0"
        )
    if config.gamma not in (0, 1):
        raise RequestRefused(
            f"algorithm_config.gamma is {config.gamma}, but DPO has no discount and no reward margin: send 0 or 1"
        )
    epsilon = finite("algorithm_config.epsilon", config.epsilon)
    if not 0 <= epsilon < 0.5:
        raise RequestRefused(
            f"algorithm_config.epsilon is {epsilon}: it is DPO's label smoothing, from 0 to below 0.5; 0 for none"
        )
    return Algorithm(beta, {"dpo": {"label_smoothing": epsilon}} if epsilon else {})


def _lora(config: LoraFinetuningConfig) -> dict[str, Any]:
    modules = [ATTENTION_MODULES.get(name, name) for name in config.lora_attn_modules]
    if config.apply_lora_to_mlp:
        modules += MLP_MODULES
    if config.apply_lora_to_output:
        modules += OUTPUT_MODULES
    if not modules:
        raise RequestRefused(
            "algorithm_config names nothing to adapt: give lora_attn_modules (such as q_proj and v_proj), or set "
            "apply_lora_to_mlp or apply_lora_to_output"
        )
    adapter: dict[str, Any] = {
        "rank": at_least_one("algorithm_config.rank", config.rank),
        "alpha": above_zero("algorithm_config.alpha", config.alpha),
        "target_modules": list(dict.fromkeys(modules)),
    }
    if config.use_dora is not None:
        adapter["use_dora"] = config.use_dora
    if config.quantize_base:  # in torchtune, whose configuration this is, it is NF4
        adapter["quantization"] = "nf4"
    return adapter
