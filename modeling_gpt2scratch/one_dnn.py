"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch comes with."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def fastest_linear(device: torch.device) -> AbstractContextManager:
    """Return `OneDnnLinear` where a model is on a CPU, and nothing elsewhere, where to ask at each call costs time."""
    return OneDnnLinear() if device.type == "cpu" else nullcontext()


@functools.cache
def onednn_linear() -> Callable | None:
    """
    Return oneDNN's linear operation, or None if this torch has none that works as expected. The operation is a private
    one of torch: no public operation multiplies by oneDNN without converting each input.
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


def _call(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class OneDnnLinear(TorchFunctionMode):
    """
    Within it, `nn.functional.linear` in fp32 without gradients is oneDNN's on a CPU, in place of MKL's: the same but
    for rounding, and twice as fast where the CPU is not Intel's, of which MKL uses half. In a torch without the
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
