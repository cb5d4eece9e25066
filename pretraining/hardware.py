"""What the machine can do, and the one setting that a CPU run cannot do without."""

import ctypes
import os
import platform

import psutil
import torch

# Dense bf16 peak of one device with fp32 accumulation, in FLOP/s, from the vendors' data sheets; the last two, which
# have no bf16, in fp16. The first name that is in the device's name counts. Laptops' GPUs, which have the names of
# larger ones, are not among them.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the half-precision peak of `device` in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name and "Laptop" not in name), None)


def flops_per_token(num_parameters: int, n_layer: int, n_embd: int, sequence_length: int) -> int:
    """
    Floating-point operations of forward and backward for one token: 6 N for the weights and 6 L C T for causal
    attention, which on average sees half of the T positions. The count that llm.c uses for its MFU.
    """
    return 6 * num_parameters + 6 * n_layer * n_embd * sequence_length


def device_description(device: torch.device, num_processes: int) -> str:
    """Return a text like `1 x NVIDIA H100 80GB HBM3`, or `1 process, CPU (x86_64, 2 threads each)`."""
    if device.type == "cpu":
        processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
        return f"{processes}, CPU ({platform.machine()}, {torch.get_num_threads()} threads each)"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    name = get_name(device) if get_name else {"mps": "Apple GPU"}.get(device.type, device.type.upper())
    return f"{num_processes} x {name}"


def usable_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores that this process may use, without hyper-threading's second ones, which only slow down matrix products."""
    return min(psutil.cpu_count(logical=False) or 1, usable_cores())


def reads_pinned_memory() -> bool:
    """Return True if the machine has an accelerator that copies from pinned memory without making the CPU wait."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"  # which shares its memory with the CPU


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators of the CPU and of `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `generator_states` returned; a device that it has no state of keeps its own."""
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])


def keep_freed_memory() -> None:
    """
    Make glibc keep the large blocks that every training step on a CPU frees and asks for again. By default it hands
    them back to the kernel, and the page faults on getting them again cost up to 60 % of a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)
