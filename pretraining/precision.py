"""The precision to train in: the one that was asked for, or the fastest that is safe on the device at hand."""

import functools
import math
import time
from dataclasses import dataclass

import torch

from pretraining.errors import UserError

NAMES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}
MEASURED_SIZE = 384  # on two cores a product takes half a millisecond, and 0.1 seconds where bf16 is emulated
MEASURED_ROUNDS = 10
EMULATED = 5  # emulation takes at least so many times as long as fp32: 30 to 80 times on AVX2


@dataclass(frozen=True)
class Precision:
    """
    Attributes:
        mixed_precision: `no`, `fp16` or `bf16`, as accelerate takes it.
        reason: why this one, to follow its name in a sentence.
        warning: what is wrong with it, None if nothing is.
    """

    mixed_precision: str
    reason: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{NAMES[self.mixed_precision]} ({self.reason})"


def choose_precision(device: torch.device, told: str | None) -> Precision:
    """
    Choose the precision of a run.

    Args:
        told: what was asked for, which is obeyed; see `launcher.told_precision`.

    Raises:
        UserError: if there is no such precision.
    """
    if told is None:
        return _best_precision(device)
    if told not in NAMES:
        raise UserError(f"mixed precision {told} is unknown: ask for no (which is fp32), fp16 or bf16")
    warning = None
    if told == "bf16" and not multiplies_bf16(device):
        warning = f"{_name(device)} has no bf16 hardware, so bf16 is much slower than {_best_name(device)}"
    elif told == "fp16" and device.type == "cpu" and not _is_faster_than_fp32(torch.float16):
        warning = f"{_name(device)} has no fast fp16, so fp16 is slower than {_best_name(device)}"
    elif told == "no" and (best := _best_name(device)) != "fp32":
        warning = f"{best} is several times as fast as fp32 on {_name(device)}"
    if warning:
        warning += ": leave --mixed_precision out to have it chosen"
    return Precision(told, "as asked for", warning)


def _best_precision(device: torch.device) -> Precision:
    if multiplies_bf16(device):
        return Precision("bf16", f"{_name(device)} multiplies it in hardware")
    if device.type == "mps":  # fp32 runs at the rate of fp16 there, and needs no loss scaling
        return Precision("no", f"{_name(device)} is not known to multiply bf16 faster")
    if device.type == "cpu":
        return Precision("no", f"{_name(device)} has no bf16 hardware")
    return Precision("fp16", f"with loss scaling, {_name(device)} has no bf16 hardware")


def _best_name(device: torch.device) -> str:
    return NAMES[_best_precision(device).mixed_precision]


def _name(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else "this GPU"


def multiplies_bf16(device: torch.device) -> bool:
    """Return True if the device multiplies matrices in bf16 by hardware, rather than by emulation."""
    if device.type == "cpu":
        return _is_faster_than_fp32(torch.bfloat16)
    is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if is_supported is None:  # torch.mps has no such function
        return False
    try:
        return is_supported(including_emulation=False)
    except TypeError:  # other accelerators' modules do not emulate
        return is_supported()


def muon_dtype(device: torch.device, mixed_precision: str) -> torch.dtype:
    """Return the dtype for Muon's products: bf16 where the run is in bf16 by hardware, else fp32."""
    in_bf16 = mixed_precision in ("bf16", "fp8") and multiplies_bf16(device)
    return torch.bfloat16 if in_bf16 else torch.float32


@functools.cache
def _is_faster_than_fp32(dtype: torch.dtype) -> bool:
    """
    Measure whether this CPU multiplies matrices faster in `dtype` than in fp32. Flags of the CPU would not tell: torch
    may be built without the instructions, or told not to use them (ONEDNN_MAX_CPU_ISA).
    """
    matrices = [torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=each) for each in (dtype, torch.float32)]
    fastest = [math.inf, math.inf]
    for number in range(MEASURED_ROUNDS):
        for index, matrix in enumerate(matrices):
            started = time.perf_counter()
            matrix @ matrix
            fastest[index] = min(fastest[index], time.perf_counter() - started)
        if number and fastest[0] > EMULATED * fastest[1]:
            return False
    return fastest[0] < fastest[1]
