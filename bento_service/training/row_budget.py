"""How many tokens a packed row may have: as many as the memory allows, and no more than make it faster."""

from pathlib import Path
from typing import Literal

from bento_service.training.devices import Device
from bento_service.training.memory import MicroBatch, estimate
from bento_service.training.model_shape import ModelShape
from bento_service.training.spec import TrainingSpec

# Beyond this many tokens matrix products gain nothing, and the row's activations only take memory.
MOST_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
FEWEST_TOKENS = 256

# The part of the free memory that the estimate may fill; what is left is for what it does not know.
FILL = 0.8


def row_tokens(spec: TrainingSpec, device: Device, precision: Literal["bf16", "fp16", "fp32"]) -> int:
    """Tokens of a packed row: the user's number, or the largest power of two whose estimated memory is there.

    A longer pair is a row of its own, so this bounds nothing but how many pairs share one.
    """
    if spec.options.dpo.max_row_tokens is not None:
        return spec.options.dpo.max_row_tokens
    tokens = MOST_TOKENS[device.kind]
    if spec.model_path is None:
        return tokens
    shape, free = ModelShape.of(Path(spec.model_path)), free_memory(device)
    while tokens > FEWEST_TOKENS:
        batch = MicroBatch(tokens=tokens, scored=tokens)
        if estimate(spec, shape, precision, device.kind, batch).total <= FILL * free:
            break
        tokens //= 2
    return tokens


def free_memory(device: Device) -> int:
    """Bytes that this process may take in all on the device, what it has now included."""
    import psutil
    import torch

    if device.kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
