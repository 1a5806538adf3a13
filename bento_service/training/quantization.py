"""Base models with weights of 4 or 8 bits under a LoRA adapter (QLoRA, arXiv 2305.14314), by bitsandbytes."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bento_service.errors import InvalidRequest
from bento_service.training.devices import Device
from bento_service.training.memory import ComputePrecision
from bento_service.training.spec import QuantizationName, TrlOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_installed() -> bool:
    """Whether bitsandbytes can be imported; it is not."""
    return importlib.util.find_spec("bitsandbytes") is not None


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a model's linear layers are loaded; embeddings, norms and the head stay in float32.

    Products are computed in ``precision`` on ``device``, from weights that are widened for each.
    """

    name: QuantizationName
    precision: ComputePrecision
    device: Device

    @classmethod
    def of(cls, options: TrlOptions, device: Device, precision: ComputePrecision) -> "Quantization | None":
        """None where none is asked for. Raises InvalidRequest when the trainer's host cannot do it."""
        name = options.lora.quantization
        if name is None:
            return None
        if device.kind == "mps":
            raise InvalidRequest(
                "lora.quantization trains on CUDA GPUs and CPUs only: leave it out", param="lora.quantization"
            )
        if not is_installed():
            raise InvalidRequest(
                "lora.quantization needs bitsandbytes, which the trainer does not find: install trl-remote[qlora]",
                param="lora.quantization",
            )
        return cls(name=name, precision=precision, device=device)

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``. NF4's scales are quantized too, as in the paper."""
        import torch
        from transformers import BitsAndBytesConfig

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if self.name == "nf4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtypes[self.precision],
            )
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        # Quantized where they will be used, on this process's own GPU: they cannot be moved later.
        place = int(os.environ.get("LOCAL_RANK", "0")) if self.device.kind == "cuda" else "cpu"
        return {"quantization_config": config, "device_map": {"": place}}


def prepare(model: "PreTrainedModel") -> "PreTrainedModel":
    """A quantized model, ready for an adapter."""
    from bitsandbytes.nn import Linear4bit
    from peft import prepare_model_for_kbit_training

    # It warns in every product of 8 bits that its inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 a pass in evaluation mode would bring the weights into an order for
            # inference, through which there is no gradient, and which rounds the scales.
            module.support_avx512bf16_for_cpu = False
    # Checkpointing is switched on by the Trainer.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
