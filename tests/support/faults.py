"""Short runs in which something goes wrong, and what they are compared with."""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import TINY, metrics
from safetensors.torch import load_file

DROPOUT = TINY + ",resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1"
BATCH, ACCUMULATION = 4, 2  # of 8 rows a step and process


def flags(data_dir: Path, output_dir: Path, *more: object) -> tuple:
    return (
        *("--data_dir", data_dir, "--output_dir", output_dir, "--config_overrides", DROPOUT, "--report_to", "none"),
        *("--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", ACCUMULATION),
        *("--logging_steps", 1, "--eval_iters", 1, "--save_total_limit", 100, *more),
    )


def timeless(output_dir: Path) -> list[dict]:
    return [{key: line[key] for key in line if "second" not in key} for line in metrics(output_dir)]


def events(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "events.jsonl").read_text().splitlines()]


def assert_equal(output_dir: Path, reference: Path) -> None:
    """The last weights and all that was logged, to the last bit."""
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output_dir, reference))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert timeless(output_dir) == timeless(reference)


def assert_equal_checkpoints(folder: Path, reference: Path) -> None:
    """Weights, optimizers and random generators, to the last bit."""
    for name in ("optimizer.pt", "rng.pt"):
        assert_equal_states(torch.load(folder / name), torch.load(reference / name))
    assert_equal_states(load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors"))


def assert_equal_states(state: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert state.keys() == expected.keys()
        for key in expected:
            assert_equal_states(state[key], expected[key])
    elif isinstance(expected, list | tuple):  # torch gives the betas back as a list
        assert len(state) == len(expected)
        for each, other in zip(state, expected, strict=True):
            assert_equal_states(each, other)
    else:
        assert torch.equal(state, expected) if isinstance(expected, torch.Tensor) else state == expected


def on_call(function: Callable, number: int, action: Callable[[], object]) -> None:
    """
    Have `action` happen at a call of a method, or of a function by its module or by what imports it later, counted
    from 1.
    """
    calls = 0

    @functools.wraps(function)
    def counting(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return function(*arguments, **keywords)

    owner = sys.modules[function.__module__]
    for name in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, name)
    setattr(owner, function.__name__, counting)


def kill_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_in(step: int, micro_step: int, number: int) -> functools.partial:
    """A signal that a process sends itself before a micro-batch of a step."""
    call = (step - 1) * ACCUMULATION + micro_step + 1
    return functools.partial(on_call, Accelerator.accumulate, call, functools.partial(kill_oneself, number))
