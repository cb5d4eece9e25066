"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch comes with."""

import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WIDTH, TIMED_ROUNDS = 768, 5  # of GPT-2 124M; some 60 ms once in a process
MARGIN = 1.25  # wide, so that the starts on a machine decide alike


def fastest_linear(device: torch.device) -> AbstractContextManager:
    """Return `OneDnnLinear` for a model on a CPU on which oneDNN is faster than MKL, and nothing elsewhere."""
    if device.type != "cpu" or onednn_linear() is None or onednn_speed() < MARGIN:
        return nullcontext()
    return OneDnnLinear()


@functools.cache
def onednn_linear() -> Callable | None:
    """
    Return oneDNN's linear operation, or None if this torch has none that works as expected. The operation is a private
    one of torch: no public operation multiplies by oneDNN without converting each input, which costs what is gained.
    """
    hidden, weight, bias = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([0.5, -0.5]),
    )
    try:
        result = _call(hidden, weight, bias)
        is_right = torch.equal(result, torch.tensor([[11.5, 16.5]]))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return _call if is_right else None


@functools.cache
@torch.no_grad()
def onednn_speed() -> float:
    """Return how many times as fast as MKL oneDNN multiplies here: one row and eight, by weights out of the memory."""
    rows = [torch.ones(1, WIDTH), torch.ones(8, WIDTH)]
    weights = [torch.ones(4 * WIDTH, WIDTH) for _ in range(4)]  # 9 MB each, more than most caches hold together
    fastest = {nn.functional.linear: math.inf, _call: math.inf}
    for _ in range(TIMED_ROUNDS):
        for function in fastest:
            started = time.perf_counter()
            for weight in weights:
                for hidden in rows:
                    function(hidden, weight)
            fastest[function] = min(fastest[function], time.perf_counter() - started)
    return fastest[nn.functional.linear] / fastest[_call]


def _call(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class OneDnnLinear(TorchFunctionMode):
    """
    Within it, `nn.functional.linear` in fp32 without gradients is oneDNN's on a CPU, in place of MKL's: the same but
    for rounding, and up to twice as fast where the CPU is not Intel's, of which MKL uses half. In a torch without the
    operation nothing changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operation = onednn_linear()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_linear = function is nn.functional.linear and not kwargs
        if is_linear and self.operation and not torch.compiler.is_compiling() and self._is_for(*args):
            return self.operation(*args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _is_for(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        tensors = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
        return (
            # Not a sharded or quantised one.
            all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
            and all(tensor.dtype == torch.float32 for tensor in tensors)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )
