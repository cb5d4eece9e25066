"""
The products of linear layers when a CPU trains in fp32.

Torch multiplies fp32 matrices on a CPU by MKL, which on some CPUs reaches half the rate of oneDNN: on an AMD EPYC with
AVX-512 180 of 400 GFLOP/s, while on CPUs of Intel's and with AVX2 alone the two are about equal
(docs/experiments.md). So the two are timed, and oneDNN is taken where it is far ahead. The margin is wide so that each
start of a run on a machine decides alike: a resumed run is then the same to the last bit.

Torch has no public way to oneDNN's product in fp32. Without the operation that is used here, or with another signature
of it, everything stays with MKL.
"""

import math
import time
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

TIMED_SHAPE = (1024, 768, 768)  # rows, inputs, outputs: as in GPT-2 124M
TIMED_ROUNDS = 10
MARGIN = 1.6
SMALLEST_WIDTH = 256  # below it the calls take longer than the products


def use_fastest_products(model: nn.Module, width: int) -> str | None:
    """
    Have the linear layers of a model in training use oneDNN's products if those are far faster than torch's own.

    Args:
        width: of the model's hidden states; a narrow model stays as it is.

    Returns:
        A line that says so, None if everything stays as it is.
    """
    if width < SMALLEST_WIDTH:
        return None
    factor = onednn_speed()
    if factor < MARGIN:
        return None
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    return f"linear layers use oneDNN's products, {factor:.1f} times as fast here as MKL's"


def onednn_speed() -> float:
    """Return how many times as fast as torch's own products oneDNN's are in fp32, 0 if torch does not offer them."""
    rows, inputs, outputs = TIMED_SHAPE
    hidden, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    works = (lambda: hidden @ weight.T, lambda: _onednn_linear(hidden, weight, None))
    try:
        plain, onednn = _fastest_times(works)
    except (AttributeError, RuntimeError, TypeError):
        return 0.0
    return plain / onednn


@torch.no_grad()
def _fastest_times(works: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Return the shortest time of each, measured in turns."""
    fastest = [math.inf] * len(works)
    for _ in range(TIMED_ROUNDS):
        for index, work in enumerate(works):
            started = time.perf_counter()
            work()
            fastest[index] = min(fastest[index], time.perf_counter() - started)
    return fastest


def _onednn_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        return _onednn_linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        hidden_grad = _onednn_linear(grad, weight.T, None) if ctx.needs_input_grad[0] else None
        grad = grad.flatten(0, -2)
        # By torch: of two transposed matrices oneDNN's product would be slower on every CPU that was tried.
        weight_grad = grad.T @ hidden.flatten(0, -2)
        return hidden_grad, weight_grad, grad.sum(0) if ctx.has_bias else None


def _forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    return _OneDnnLinear.apply(hidden, self.weight, self.bias)
