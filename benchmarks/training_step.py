"""
Tokens a second of a training step: forward and backward pass, clipping and the optimizer's update.

    python benchmarks/training_step.py                  # GPT-2 124M and the demo's shape on a CPU, about an hour
    python benchmarks/training_step.py --shape 124M --per_device_train_batch_size 32        # on a GPU
    python benchmarks/training_step.py --shape demo --mixed_precision no                    # in fp32

Ours is `train_step` of train_accelerate.py; stock is transformers' GPT2LMHeadModel in a
plain loop, nanoGPT's a transcription of its model (`peers.py`) in the same loop. All have AdamW with torch's fused
kernel, no dropout, random tokens and the same precision: bf16 or fp16 is torch's autocast, and fp16 has loss scaling.
On a CPU the peers run with glibc's allocator as it is, which is how they come, and, in the lines of "tuned", with
`hardware.keep_freed_memory` as ours does. Each is a process, in turns.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from benchmarks.peers import NanoGPT
from modeling_gpt2scratch import GPT2ScratchConfig
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.data.packed_rows import ModelInputs
from pretraining.distributed.processes import open_accelerator, open_state
from pretraining.markdown import table
from pretraining.optimization.optimizer import ADAM_BETAS, build_optimizer, has_fused_adamw
from pretraining.optimization.options import Optim
from pretraining.precision import muon_dtype
from pretraining.training.model import attention_on, build_model
from train_accelerate import train_step

Shape = dict[str, Any]  # of a model: arguments of its config
SHAPES: dict[str, Shape] = {
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257},
    "demo": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": 8_192},
}
NO_DROPOUT: dict[str, Any] = {
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BATCH_SIZES = {"124M": 4, "demo": 16}
WARM_UP_STEPS = 2
TIMED_STEPS = {"124M": 3, "demo": 15}
OURS, STOCK, NANOGPT = "ours", "stock", "nanoGPT's"
TUNED, COMPILED = ", tuned", ", compiled"
LLM_C = 468_000  # tokens/s of this model on one H100, the figure usually quoted of llm.c; not measured here


@dataclass
class BenchmarkArguments:
    shape: Literal["both", "124M", "demo"] = flag("both", "the model")
    per_device_train_batch_size: int = flag(None, "rows of a step: 4 of the 124M shape, 16 of the demo's if left out")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    rounds: int = flag(5, "processes of each")
    measure: str = flag(None, "measure this one, in this process")


def measure(args: BenchmarkArguments) -> dict[str, float]:
    program, is_compiled = args.measure.split(",")[0], COMPILED in args.measure
    if side_by_side.device().type == "cpu" and (program == OURS or TUNED in args.measure):
        hardware.keep_freed_memory()
    shape, batch_size = SHAPES[args.shape], args.per_device_train_batch_size
    step = build_step(program, shape, batch_size, args.mixed_precision, is_compiled)
    figures = speed(step, shape, batch_size, TIMED_STEPS[args.shape])
    if args.measure == OURS:
        del step
        tokens = batch_size * shape["n_positions"]
        figures["products' tokens/s"] = tokens / seconds_of_products(shape, batch_size, args.mixed_precision)
    return figures


def speed(step: Callable[[], object], shape: Shape, batch_size: int, timed_steps: int) -> dict[str, float]:
    """Warm a step up and time it. Returns its `tokens/s`, and the peak `megabytes` of this process."""
    for _ in range(WARM_UP_STEPS):
        step()
    times = [side_by_side.seconds(step) for _ in range(timed_steps)]
    tokens = batch_size * shape["n_positions"]
    return {"tokens/s": tokens / statistics.median(times), "megabytes": side_by_side.memory(peak=True)}


def seconds_of_products(shape: Shape, batch_size: int, mixed_precision: str) -> float:
    """
    Time the matrix products of a step and nothing else, one after the other in the dtype of the step: those of the
    linear layers and the head with their two gradients, and the six of attention over half of the keys, as it is
    causal.
    """
    device, dtype = side_by_side.device(), side_by_side.DTYPES[mixed_precision]
    length, width, heads = shape["n_positions"], shape["n_embd"], shape["n_head"]

    def measure(*operands: torch.Tensor) -> float:
        out = torch.matmul(*operands)
        return statistics.median(side_by_side.seconds(lambda: torch.matmul(*operands, out=out)) for _ in range(3))

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    def linear(inner: int, outer: int) -> float:
        hidden, weight, gradient = (
            random(batch_size * length, inner),
            random(outer, inner),
            random(batch_size * length, outer),
        )
        return measure(hidden, weight.T) + measure(gradient, weight) + measure(gradient.T, hidden)

    queries = random(batch_size * heads, length, width // heads)
    keys = random(batch_size * heads, length // 2, width // heads)
    scores = random(batch_size * heads, length, length // 2)
    attention = 2 * (measure(queries, keys.mT) + measure(scores, keys) + measure(scores.mT, queries))
    layer = linear(width, 3 * width) + linear(width, width) + linear(width, 4 * width) + linear(4 * width, width)
    return shape["n_layer"] * (layer + attention) + linear(width, shape["vocab_size"])


def build_step(
    program: str, shape: Shape, batch_size: int, mixed_precision: str, is_compiled: bool
) -> Callable[[], object]:
    """Return a function that takes one training step of a program on a batch of random rows."""
    torch.manual_seed(0)
    rows = torch.randint(shape["vocab_size"], (batch_size, shape["n_positions"] + 1))
    if program == OURS:
        return partial(train_step, *build_ours(shape, rows[:, :-1], mixed_precision, is_compiled), max_grad_norm=1.0)
    return plain_loop(program, shape, rows, mixed_precision, is_compiled)


def build_ours(
    shape: Shape, rows: torch.Tensor, mixed_precision: str, is_compiled: bool, optim: Optim = "adamw"
) -> tuple[nn.Module, AcceleratedOptimizer, list[dict[str, Any]], Accelerator]:
    """Return the first arguments of `train_step`, made as train_accelerate.py makes them."""
    accelerator = open_accelerator(open_state(), 1, is_compiled, mixed_precision)
    attention = attention_on(accelerator.device, mixed_precision, "sdpa")
    with accelerator.device:  # where a large model's weights are made in no time
        config = GPT2ScratchConfig(**shape, **NO_DROPOUT)
        model: nn.Module = build_model(config, None, attention, gradient_checkpointing=False)
    dtype = muon_dtype(accelerator.device, mixed_precision)
    optimizer = build_optimizer(model, optim, 6e-4, 0.1, accelerator.device, dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    inputs = ModelInputs(accelerator.device, shape["vocab_size"])(rows)
    return model, optimizer, [inputs], accelerator


def plain_loop(
    program: str, shape: Shape, rows: torch.Tensor, mixed_precision: str, is_compiled: bool
) -> Callable[[], object]:
    device = side_by_side.device()
    with device:
        model = GPT2LMHeadModel(GPT2Config(**shape, **NO_DROPOUT)) if program == STOCK else NanoGPT(**shape)
    model.train()
    fused = has_fused_adamw(device)
    optimizer = AdamW(model.parameters(), lr=6e-4, betas=ADAM_BETAS, weight_decay=0.1, fused=fused)
    scaler = side_by_side.loss_scaler(mixed_precision)
    called: Callable = torch.compile(model) if is_compiled else model
    rows = rows.to(device)
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def step() -> None:
        with side_by_side.autocast(mixed_precision):
            if program == STOCK:
                loss = called(input_ids=inputs, labels=inputs, use_cache=False).loss
            else:
                loss = called(inputs, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def section(args: BenchmarkArguments, shape: str) -> str:
    """Return the Markdown of one shape."""
    on_cpu = side_by_side.device().type == "cpu"
    batch_size = args.per_device_train_batch_size or BATCH_SIZES[shape]
    names = [OURS, OURS + COMPILED]
    for peer in (STOCK, NANOGPT):
        names += [peer, peer + TUNED, peer + TUNED + COMPILED] if on_cpu else [peer, peer + COMPILED]
    flags = ["--shape", shape, "--per_device_train_batch_size", batch_size]
    flags += ["--mixed_precision", args.mixed_precision]
    measured = side_by_side.in_turns(__file__, names, args.rounds, *flags)
    rate = {name: side_by_side.median(measured, name, "tokens/s") for name in names}
    best, peer = max(names[:2], key=rate.__getitem__), max(names[2:], key=rate.__getitem__)
    limit = side_by_side.median(measured, OURS, "products' tokens/s")
    parts = [
        f"{shape}, {batch_size} rows of {SHAPES[shape]['n_positions']} tokens, "
        f"{side_by_side.precision_name(args.mixed_precision)}, medians of {args.rounds} rounds:",
        table_of(measured, SHAPES[shape], args.mixed_precision, rate, best),
        f"The matrix products of a step alone, run one after the other in the processes of ours, are {limit:,.0f} "
        f'tokens/s, {limit / rate[peer]:.2f} times "{peer}": no step is faster.',
    ]
    if not on_cpu and shape == "124M":
        parts.append(beside_llm_c(rate[best]))
    return "\n\n".join(parts)


def beside_llm_c(rate: float) -> str:
    return f"Of llm.c {LLM_C:,} tokens/s are quoted on one H100: ours is {rate / LLM_C:.2f} of it."


def table_of(
    measured: side_by_side.Measured, shape: Shape, mixed_precision: str, rate: dict[str, float], best: str
) -> str:
    rows = side_by_side.medians(measured, {"tokens/s": ",.0f", "megabytes": ",.0f"})
    utilisation = {name: model_flops_utilisation(shape, mixed_precision, rate[name]) for name in measured}
    has_peak = utilisation[best] is not None
    for name, row in zip(measured, rows, strict=True):
        if has_peak:
            row.append(f"{utilisation[name]:.1%}")
        faster = side_by_side.ratio(measured, best, name, "tokens/s")
        smaller = side_by_side.ratio(measured, best, name, "megabytes")
        row += ["", ""] if name.startswith(OURS) else [f"{faster:.2f}", f"{smaller:.2f}"]
    header = ["", "tokens/s", "peak MB", *(["MFU"] if has_peak else []), f'"{best}" is so many times as fast', "takes"]
    return table(header, rows)


def model_flops_utilisation(shape: Shape, mixed_precision: str, rate: float) -> float | None:
    """
    Return the share of the device's half-precision peak that so many tokens a second use, None in fp32 or where the
    peak is not known.
    """
    peak = hardware.peak_flops(side_by_side.device())
    if peak is None or mixed_precision == "no":
        return None
    config = GPT2ScratchConfig(**shape, **NO_DROPOUT)
    with torch.device("meta"):
        parameters = build_model(config, None, "sdpa", gradient_checkpointing=False).num_parameters()
    return rate * hardware.flops_per_token(parameters, config.n_layer, config.n_embd, config.n_positions) / peak


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    shapes = SHAPES if args.shape == "both" else [args.shape]
    sections = [section(args, shape) for shape in shapes]
    print("\n\n".join([side_by_side.here("torch", "transformers", "accelerate"), *sections]))


if __name__ == "__main__":
    run_script(main)
