"""The output head and its loss in one, without ever holding the logits of all tokens.

Shapes in the comments: N tokens, C width, V vocabulary, R tokens of a tile.
"""

from typing import Any

import torch
from torch import nn

# Tokens whose logits exist at the same time, times the bytes of one: 4,096 in bf16. Each tile costs a pass over the
# weight's gradient. On a CPU a quarter of it is as fast, and a GPU has the memory.
TILE = 8192
CPU_TILE = 2048
# On a CPU the softmax goes over blocks of so many logits, 4 MB in fp32, which stay in its cache.
CPU_BLOCK = 1 << 20
# Matrix products are slow where the vocabulary is no multiple of this: 50,257 takes 10 % longer than 50,304 on a CPU.
VOCABULARY_MULTIPLE = 64


def causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss`, from hidden states (B, T, C) and the head's weight instead of the logits."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden_states.device)
    return linear_cross_entropy(hidden_states, weight, shift_labels, num_items_in_batch, ignore_index)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """
    `cross_entropy(hidden_states @ weight.T, labels)`, loss and gradients, in little memory.

    The logits are made for one tile of tokens after the other, and their gradients right away: what is kept for the
    backward pass has the size of `hidden_states` and of `weight`, not of the logits. The matrix products run on a
    vocabulary padded with zeros to a multiple of 64, as in nanoGPT; the softmax never sees the padding. The idea is
    that of Liger Kernel's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989).

    Args:
        hidden_states (`(..., C)`): what the head would get.
        weight (`(V, C)`): the head's.
        labels (`(...)`): token ids, of the same leading shape as `hidden_states`; `ignore_index` counts for nothing.
        num_items_in_batch: what to divide the summed loss by; the number of labels that count if left out.

    Returns:
        The loss in nats per token, an fp32 scalar that can be differentiated once. Under autocast the products run in
        its dtype and the softmax in fp32, as they would in the plain form.

    Raises:
        ValueError: if there are not as many labels as hidden states.
    """
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not fit hidden states of shape {tuple(hidden_states.shape)}."
        )
    labels = labels.flatten()
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden_states.device)
    else:
        num_items_in_batch = torch.full((), num_items_in_batch, device=hidden_states.device)
    return _LinearCrossEntropy.apply(
        hidden_states.flatten(0, -2),
        weight,
        labels,
        num_items_in_batch,
        ignore_index,
        # Asked here: inside, gradients are always off, and the inputs look as if they needed one under no_grad too.
        torch.is_grad_enabled(),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of (N, C) hidden states, with both gradients of its sum computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        num_items: torch.Tensor,
        ignore_index: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        needs_grad = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(device, enabled=False):
            loss, hidden_grad, weight_grad = _loss_and_gradients(
                hidden_states.to(dtype), weight, labels, ignore_index, *needs_grad
            )
        ctx.save_for_backward(hidden_grad, weight_grad, num_items)
        ctx.dtypes = hidden_states.dtype, weight.dtype
        return loss / num_items

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "This loss can be differentiated once only; skip_logits=False gives one that can twice."
            )
        *gradients, num_items = ctx.saved_tensors
        # As cross_entropy: where no label counts the loss is 0 / 0, and the gradients are zeros all the same.
        scale = (grad_output / num_items).masked_fill(num_items == 0, 0)
        hidden_grad, weight_grad = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return hidden_grad, weight_grad, None, None, None, None


def _loss_and_gradients(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Summed loss, its gradient by `hidden_states` (N, C), in their dtype, and by `weight` (V, C), in fp32."""
    vocab_size, width = weight.shape
    padding = -vocab_size % VOCABULARY_MULTIPLE
    padded_weight = hidden_states.new_zeros(vocab_size + padding, width)
    padded_weight[:vocab_size] = weight
    counts = (labels != ignore_index).unsqueeze(1)  # (N, 1)
    targets = labels.unsqueeze(1).masked_fill(~counts, 0)

    loss = torch.zeros((), dtype=torch.float32, device=weight.device)
    hidden_grad = torch.empty_like(hidden_states) if needs_hidden_grad else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight_grad else None
    tile_size = CPU_TILE if weight.device.type == "cpu" else TILE
    rows = max(1, min(tile_size // hidden_states.element_size(), hidden_states.shape[0]))
    # One buffer for all tiles each: fresh memory is slow memory.
    buffer = hidden_states.new_empty(rows, vocab_size + padding)
    tile_weight_grad = torch.empty_like(padded_weight) if needs_weight_grad else None
    for start in range(0, hidden_states.shape[0], rows):
        tile = slice(start, start + rows)
        logits = buffer[: hidden_states[tile].shape[0]]  # (R, V + padding)
        torch.mm(hidden_states[tile], padded_weight.T, out=logits)
        loss += _loss_of_tile(logits, vocab_size, targets[tile], counts[tile], needs_hidden_grad or needs_weight_grad)
        if needs_hidden_grad:
            torch.mm(logits, padded_weight, out=hidden_grad[tile]).masked_fill_(~counts[tile], 0)
        if needs_weight_grad:
            torch.mm(logits.T, hidden_states[tile] * counts[tile], out=tile_weight_grad)
            weight_grad += tile_weight_grad[:vocab_size]
    return loss, hidden_grad, weight_grad


def _loss_of_tile(
    logits: torch.Tensor, vocab_size: int, targets: torch.Tensor, counts: torch.Tensor, needs_grad: bool
) -> torch.Tensor:
    """
    Summed loss of the rows that count, from their logits (R, V + padding). With `needs_grad` these become, in place,
    the gradients of each row's loss, softmax minus one-hot. Those of the padding are zeros, and stay so.
    """
    in_cache = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, CPU_BLOCK // vocab_size) if in_cache else logits.shape[0]
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    # One for all blocks: memory that is fresh from the kernel costs a CPU more than what is computed in it.
    buffer = logits.new_empty(min(rows, len(logits)), vocab_size, dtype=torch.float32) if in_cache else None
    for block, target, count in zip(
        logits[:, :vocab_size].split(rows), targets.split(rows), counts.split(rows), strict=True
    ):
        out = buffer[: len(block)] if in_cache else None
        log_probs = torch.log_softmax(block, dim=-1, dtype=torch.float32, out=out)
        loss -= log_probs.gather(1, target).masked_fill(~count, 0).sum()
        if needs_grad:
            minus_one_hot = -torch.ones_like(target, dtype=torch.float32)
            block.copy_(log_probs.exp_().scatter_add_(1, target, minus_one_hot))
    return loss
