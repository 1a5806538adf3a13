"""The adapter that is trained when ``tuning`` is "lora"."""

import functools
from typing import Literal

from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from bento_service.errors import InvalidRequest
from bento_service.training.spec import LoraOptions

# Names of the heads that PEFT trains whole under SEQ_CLS.
CLASSIFIERS = {"classifier", "score"}


def lora_config(
    lora: LoraOptions, model: PreTrainedModel, *, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> LoraConfig:
    """The adapter; under SEQ_CLS the new head is trained whole and saved with it.

    Raises InvalidRequest for target modules that the model lacks or that TRL cannot train."""
    if lora.target_modules != "all-linear":
        head = model.get_output_embeddings()
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        } - CLASSIFIERS
        if unknown := sorted(set(lora.target_modules) - linear):
            raise InvalidRequest(
                f"lora.target_modules {unknown} cannot be adapted: name some of {sorted(linear)} "
                "(TRL does not train an adapter of the output head)",
                param="lora.target_modules",
            )
    return LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
    )


def keep_head_wide(model: PeftModel) -> None:
    """Train the head in float32, which its inputs are; over a quantized model TRL makes all that is trained bf16."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.float()


def resume_as_saved(model: PeftModel) -> None:
    """Let the Trainer load a checkpoint's adapter in the precision in which it was trained.

    Over a quantized model TRL keeps it in bf16, which PEFT would widen to float32 when it is loaded.
    """
    model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)
