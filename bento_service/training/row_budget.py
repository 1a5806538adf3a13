"""How many tokens a packed row may have: as many as the memory allows, and no more than make it faster."""

from bento_service import host_memory
from bento_service.training.devices import Device
from bento_service.training.memory import ComputePrecision, DeviceKind, MicroBatch, estimate
from bento_service.training.model_shape import ModelShape
from bento_service.training.rank import Rank
from bento_service.training.spec import TrainingSpec

# Beyond this many tokens matrix products gain nothing, and the row's activations only take memory.
MOST_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 8192}
FEWEST_TOKENS = 256

# The part of the free memory that the estimate may fill; what is left is for what it does not know.
FILL = 0.8


def row_tokens(
    spec: TrainingSpec,
    shape: ModelShape | None,
    kind: DeviceKind,
    precision: ComputePrecision,
    *,
    free: int | None,
) -> int:
    """Tokens of a packed row: the user's number, or the largest power of two whose estimated memory is there.

    A longer pair is a row of its own, so this bounds nothing but how many pairs share one. ``free`` is in bytes;
    None, like a model whose shape is not known, leaves the limit of the device.
    """
    if spec.options.dpo.max_row_tokens is not None:
        return spec.options.dpo.max_row_tokens
    tokens = MOST_TOKENS[kind]
    if shape is None or free is None:
        return tokens
    while tokens > FEWEST_TOKENS:
        batch = MicroBatch(tokens=tokens, scored=tokens, packed=True, partial=True)
        if estimate(spec, shape, precision, kind, batch).total <= FILL * free:
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
    # Other ranks of the job take as much.
    return host_memory.available() // Rank.of_this_process().count + psutil.Process().memory_info().rss
