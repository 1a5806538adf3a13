"""The vocabulary's head on a CPU: log-probabilities of reply tokens in small tiles.

What TRL's ChunkedLogProbFunction computes, with the same results. TRL's tiles are made for a GPU's memory; on a CPU
a tile of 4,096 tokens and 32,768 words does not fit any cache, and a dozen temporary tensors of its size make up most
of a training step's memory. Here a tile has few tokens and is worked on in place.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# Logits in a tile, so that it stays in the last level of cache of most processors; measured on 2 cores.
TILE_LOGITS = 1 << 23

# Attributes of a configuration by which a model's forward pass changes its logits.
_CHANGES_LOGITS = (
    "final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling",
)  # fmt: skip


def applies_to(model: PreTrainedModel) -> bool:
    """Whether a model's logits are its last hidden states times its head's weights and nothing else, on a CPU."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = all(getattr(config, name, None) in (None, 1.0) for name in _CHANGES_LOGITS)
    return plain and head is not None and head.bias is None and head.weight.device.type == "cpu"


def score(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> FusedCausalLMOutput:
    """Score ``targets`` [1, N] from the hidden states [1, N, H] that predict them; the answer's fields are [1, N]."""
    weight = model.get_output_embeddings().weight
    fields = _ReplyLogProbs.apply(hidden[0], weight, targets[0])
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    return FusedCausalLMOutput(**{name: value[None] for name, value in zip(names, fields, strict=True)})


class _ReplyLogProbs(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], targets [N]) to log-probabilities, entropy, log of the sum of squared

    probabilities, mean logit, and whether the target is the most likely word, [N] each. Only the first has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        with torch.autocast("cpu", enabled=False):  # the sums are float32's
            return _ReplyLogProbs._score(ctx, dtype, hidden, weight, targets)

    @staticmethod
    def _score(
        ctx: Any, dtype: torch.dtype, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        weight_in = weight.to(dtype)
        trains_hidden, trains_weight = ctx.needs_input_grad[:2]
        # d log p(target) / d hidden = W[target] - sum of p * W. With frozen weights this is all that backward needs.
        keeps_direction = trains_hidden and not trains_weight
        count = len(targets)
        log_probs, entropy, squares, largest, log_z = (hidden.new_empty(count, dtype=torch.float32) for _ in range(5))
        is_top1 = torch.empty(count, dtype=torch.bool)
        direction = torch.empty(hidden.shape, dtype=torch.float32) if keeps_direction else None
        for tile in _tiles(count, len(weight)):
            states = hidden[tile].to(dtype)
            logits = (states @ weight_in.T).float()
            largest[tile] = logits.amax(dim=-1)
            target = logits.gather(-1, targets[tile, None])[:, 0]
            is_top1[tile] = target >= largest[tile]
            powers = (logits - largest[tile, None]).exp_()
            total = powers.sum(dim=-1)
            log_z[tile] = largest[tile] + total.log()
            log_probs[tile] = target - log_z[tile]
            entropy[tile] = log_z[tile] - torch.linalg.vecdot(powers, logits) / total
            squares[tile] = torch.linalg.vecdot(powers, powers).log() - 2 * total.log()
            if direction is not None:
                powers /= total[:, None]
                direction[tile] = weight[targets[tile]].float() - (powers.to(dtype) @ weight_in).float()
        # The mean of linear functions is that of their weights.
        mean_logits = hidden.float() @ weight.float().mean(dim=0)
        ctx.save_for_backward(hidden, weight, targets, log_z, direction)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(entropy, squares, mean_logits, is_top1)
        return log_probs, entropy, squares, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets, log_z, direction = ctx.saved_tensors
        if direction is not None:
            return (gradient[:, None] * direction).to(hidden.dtype), None, None
        trains_hidden, trains_weight = ctx.needs_input_grad[:2]
        weight_in = weight.to(ctx.dtype)
        hidden_gradient = torch.empty(hidden.shape, dtype=torch.float32) if trains_hidden else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32) if trains_weight else None
        for tile in _tiles(len(targets), len(weight)):
            states = hidden[tile].to(ctx.dtype)
            # d log p(target) / d logits = 1 at the target, minus p
            logits = (states @ weight_in.T).float()
            logits.sub_(log_z[tile, None]).exp_().mul_(-gradient[tile, None])
            logits.scatter_add_(-1, targets[tile, None], gradient[tile, None])
            logits = logits.to(ctx.dtype)
            if hidden_gradient is not None:
                hidden_gradient[tile] = (logits @ weight_in).float()
            if weight_gradient is not None:
                if ctx.dtype == torch.float32:
                    weight_gradient.addmm_(logits.T, states)
                else:
                    weight_gradient += (logits.T @ states).float()
        return (
            None if hidden_gradient is None else hidden_gradient.to(hidden.dtype),
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None,
        )


def _tiles(count: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE_LOGITS // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
