"""Attention over a packed row: each token sees its own sequence up to itself, and nothing of the others.

Registered with transformers under ``NAME``; a model that is set to it takes the row as the keyword ``packed_row`` of
its forward pass. On CUDA it is one FlexAttention kernel with a block mask of the trees; elsewhere each tree is two
calls of PyTorch's scaled dot-product attention, which costs nothing for what a mask over the row would leave out.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bento_service.training.packing import PackedRow

NAME = "packed"

# What attention functions are given that would change the result, and that this one does not know.
_UNKNOWN_ARGUMENTS = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, kv_heads, T, D]; returns [1, T, heads, D].

    Raises NotImplementedError for a model that asks for more than plain causal attention.
    """
    row: PackedRow | None = kwargs.get("packed_row")
    if row is None:
        raise NotImplementedError("packed attention without a packed row: the model does not pass its arguments on")
    if unknown := [name for name in _UNKNOWN_ARGUMENTS if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {unknown[0]}")
    if query.shape[2] != row.tokens:
        raise NotImplementedError("packed attention over other tokens than those of the row")
    if query.device.type == "cuda" and dropout == 0:
        output = _by_block_mask(row, query, key, value, scaling)
    else:
        output = _by_tree(row, query, key, value, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)


def _by_tree(
    row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split, whose backward pass is one concatenation; a slice a tree would add up T zeros for each.
    lengths = [length for tree in row.trees for length in (tree.shared + tree.chosen, tree.rejected)]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for number, tree in enumerate(row.trees):
        first, second = 2 * number, 2 * number + 1
        outputs.append(
            scaled_dot_product_attention(
                queries[first], keys[first], values[first], is_causal=True, scale=scaling, dropout_p=dropout
            )
        )
        if tree.rejected:
            outputs.append(
                scaled_dot_product_attention(
                    queries[second],
                    torch.cat([keys[first][:, :, : tree.shared], keys[second]], dim=2),
                    torch.cat([values[first][:, :, : tree.shared], values[second]], dim=2),
                    attn_mask=_tail_mask(tree.shared, tree.rejected, query.device),
                    scale=scaling,
                    dropout_p=dropout,
                )
            )
    return torch.cat(outputs, dim=2)


def _tail_mask(shared: int, tail: int, device: torch.device) -> Tensor:
    """[tail, shared + tail]: the last tokens of a sequence see all before them and themselves."""
    return torch.ones(tail, shared + tail, dtype=torch.bool, device=device).tril(shared)


def _by_block_mask(row: PackedRow, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    return _compiled()(query, key, value, block_mask=block_mask(row, query.device), scale=scaling, enable_gqa=True)


def block_mask(row: PackedRow, device: torch.device) -> BlockMask:
    """The row's mask [1, 1, T, T] for FlexAttention, made once a row."""
    if row.block_masks.get(device) is None:
        lengths = torch.tensor([length for tree in row.trees for length in tree], device=device)
        part = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=row.tokens)
        tree, branch = part // 3, part % 3

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own_sequence = (branch[key] == 0) | (branch[key] == branch[query])
            return (tree[query] == tree[key]) & own_sequence & (key <= query)

        row.block_masks[device] = create_block_mask(sees, None, None, row.tokens, row.tokens, device=device)
    return row.block_masks[device]


@cache
def _compiled() -> Callable[..., Tensor]:
    # Compiled for one shape, and for any at the second; more often only where precision or gradients differ. Past the
    # limit PyTorch would make the matrix of all scores instead.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention)
