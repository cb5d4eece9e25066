"""
Causal attention for training on a CPU in bf16: `attn_implementation="tiled"`.

Torch's own kernel for CPUs multiplies its small blocks at a seventh of the rate of oneDNN's matrix products. Here
those make the scores, for one tile of queries after the other, and make them again on the way back: the memory is that
of the keys, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135), but a tile has whole rows of scores, so that a
plain softmax does. The scores are rounded to the dtype of the queries before it, as they are in "eager".

Shapes in the comments: BH heads of all rows of the batch, T tokens, D width of a head, R queries of a tile, K keys up
to its last query.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TILED = "tiled"
# Queries of a tile. More of them compute more scores that the causal mask throws away, fewer make smaller products.
TILE_QUERIES = 128
# Scores of a tile, of as many rows of the batch as make so many: 6 MB in bf16, for the cache.
TILE_SCORES = 3 << 20


def tiled_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    As transformers' `sdpa_attention_forward`, which has what this does not: dropout, queries that follow on a cache,
    masks that are not boolean, and other devices.
    """
    is_boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if dropout or query.device.type != "cpu" or query.shape != key.shape or not is_boolean:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query * scaling, key, value, attention_mask).transpose(1, 2), None


# Custom operators, so that torch.compile takes each as a whole: it would compile every tile by itself.
@torch.library.custom_op("gpt2scratch::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """
    softmax(Q K^T) V, each token seeing itself and those before.

    Args:
        query, key, value (`(B, H, T, D)`): the queries scaled already.
        mask (`(B or 1, 1, T, T)`, boolean, *optional*): True where a query sees a key; never a later one.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    flat_output, flat_value = output.flatten(0, 1), value.flatten(0, 1)
    for heads, queries, keys, weights in _tiles(query.flatten(0, 1), key.flatten(0, 1), query.shape[1], mask):
        torch.bmm(weights, flat_value[heads, keys], out=flat_output[heads, queries])
    return output


@torch.library.custom_op("gpt2scratch::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value, from that by the output."""
    shape, num_heads = query.shape, query.shape[1]
    grad, query, key, value = (tensor.flatten(0, 1) for tensor in (grad, query, key, value))
    query_grad = torch.empty_like(query)
    # A key's gradient is a sum over tiles, kept in fp32.
    key_grad = torch.zeros_like(key, dtype=torch.float32)
    value_grad = torch.zeros_like(value, dtype=torch.float32)
    for heads, queries, keys, weights in _tiles(query, key, num_heads, mask):
        tile_grad = grad[heads, queries]  # (BH, R, D)
        value_grad[heads, keys] += weights.transpose(1, 2) @ tile_grad
        weights_grad = tile_grad @ value[heads, keys].transpose(1, 2)  # (BH, R, K)
        scores_grad = softmax_backward(weights_grad, weights)
        torch.bmm(scores_grad, key[heads, keys], out=query_grad[heads, queries])
        key_grad[heads, keys] += scores_grad.transpose(1, 2) @ query[heads, queries]
    return query_grad.view(shape), key_grad.to(key.dtype).view(shape), value_grad.to(value.dtype).view(shape)


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """
    Return the gradient by the input of a softmax over the last dimension, from that by its output `weights`.

    Autograd's kernel for it takes one pass over the scores and rounds once, but torch has no public name for it. A
    torch without it, or with another signature of it, computes the formula in fp32.
    """
    try:
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    except (AttributeError, RuntimeError, TypeError):
        grad, outputs = grad.float(), weights.float()
        return (outputs * (grad - (grad * outputs).sum(-1, keepdim=True))).to(weights.dtype)


def _tiles(
    query: Tensor, key: Tensor, num_heads: int, mask: Tensor | None
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """For each tile its heads, its queries, the keys that they may see, and their weights (heads, R, K)."""
    length = query.shape[1]
    rows_at_once = max(1, TILE_SCORES // (num_heads * TILE_QUERIES * length))
    unseen = torch.finfo(query.dtype).min  # not -inf, of which a query that sees nothing, a padded one, would make NaN
    future = torch.full((TILE_QUERIES, TILE_QUERIES), unseen, dtype=query.dtype).triu(1)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, unseen)
        mask = mask.expand(query.shape[0] // num_heads, -1, -1, -1)
    for row in range(0, query.shape[0] // num_heads, rows_at_once):
        heads = slice(row * num_heads, (row + rows_at_once) * num_heads)
        for start in range(0, length, TILE_QUERIES):
            queries, keys = slice(start, start + TILE_QUERIES), slice(min(start + TILE_QUERIES, length))
            scores = query[heads, queries] @ key[heads, keys].transpose(1, 2)  # (heads, R, K)
            if mask is None:
                size = keys.stop - start
                scores[..., start:] += future[:size, :size]
            else:
                scores.unflatten(0, (-1, num_heads)).add_(mask[row : row + rows_at_once, :, queries, keys])
            yield heads, queries, keys, torch.softmax(scores, dim=-1)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape)


@causal_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *causal_attention_backward(grad, *ctx.saved_tensors), None


causal_attention.register_autograd(_backward, setup_context=_save)
ALL_ATTENTION_FUNCTIONS.register(TILED, tiled_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(TILED, sdpa_mask)
