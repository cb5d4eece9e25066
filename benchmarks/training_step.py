"""
Tokens a second of a training step: forward and backward pass, clipping and the optimizer's update, in bf16.

    python benchmarks/training_step.py                  # GPT-2 124M and the demo's shape on a CPU, about an hour
    python benchmarks/training_step.py --shape 124M --per_device_train_batch_size 32        # on a GPU

Ours is `pretraining.steps.train_step` as train_accelerate.py calls it; stock is transformers' GPT2LMHeadModel in a
plain loop, nanoGPT's a transcription of its model (`peers.py`) in the same loop. All have AdamW with torch's fused
kernel, no dropout, and random tokens. On a CPU the peers run with glibc's allocator as it is, which is how they come,
and, in the lines of "tuned", with `hardware.keep_freed_memory` as ours does. Each is a process, in turns.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from benchmarks.peers import NanoGPT
from modeling_gpt2scratch import GPT2ScratchConfig
from pretraining import hardware
from pretraining.arguments import flag, parse_arguments, run_script
from pretraining.inputs import ModelInputs
from pretraining.markdown import table
from pretraining.models import attention_on, build_model
from pretraining.optim import ADAM_BETAS, build_optimizers
from pretraining.steps import train_step

SHAPES = {
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257},
    "demo": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": 8_192},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
BATCH_SIZES = {"124M": 4, "demo": 16}
TIMED_STEPS = {"124M": 3, "demo": 15}
TUNED, COMPILED = ", tuned", ", compiled"
LLM_C = 468_000  # tokens/s of this model on one H100, the figure usually quoted of llm.c; not measured here


@dataclass
class BenchmarkArguments:
    shape: Literal["both", "124M", "demo"] = flag("both", "the model")
    per_device_train_batch_size: int = flag(None, "rows of a step: 4 of the 124M shape, 16 of the demo's if left out")
    rounds: int = flag(5, "processes of each")
    measure: str = flag(None, "measure this one, in this process")


def measure(args: BenchmarkArguments) -> dict[str, float]:
    device = side_by_side.device()
    peer, is_compiled = args.measure.split(",")[0], COMPILED in args.measure
    if device.type == "cpu" and (peer == "ours" or TUNED in args.measure):
        hardware.keep_freed_memory()
    torch.manual_seed(0)
    shape = SHAPES[args.shape]
    rows = torch.randint(shape["vocab_size"], (args.per_device_train_batch_size, shape["n_positions"] + 1))
    step = (ours if peer == "ours" else plain_loop)(peer, shape, rows, device, is_compiled)
    step()
    step()
    times = [side_by_side.seconds(step) for _ in range(TIMED_STEPS[args.shape])]
    tokens = rows.numel() - len(rows)
    figures = {"tokens/s": tokens / statistics.median(times), "megabytes": side_by_side.memory(peak=True)}
    if args.measure == "ours":
        del step
        figures["products' tokens/s"] = tokens / seconds_of_products(shape, len(rows), device)
    return figures


def seconds_of_products(shape: dict, batch_size: int, device: torch.device) -> float:
    """
    The matrix products of a step and nothing else, one after the other in bf16: those of the linear layers and the
    head with their two gradients, and the six of attention over half of the keys, as it is causal.
    """
    length, width, heads = shape["n_positions"], shape["n_embd"], shape["n_head"]

    def measure(*operands: torch.Tensor) -> float:
        out = torch.matmul(*operands)
        return statistics.median(side_by_side.seconds(lambda: torch.matmul(*operands, out=out)) for _ in range(3))

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).bfloat16()

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


def ours(_: str, shape: dict, rows: torch.Tensor, device: torch.device, is_compiled: bool) -> Callable[[], object]:
    accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
    attention = attention_on(device, "bf16", "sdpa")
    model = build_model(GPT2ScratchConfig(**shape, **NO_DROPOUT), None, attention, gradient_checkpointing=False)
    optimizers = build_optimizers(model, "adamw", 6e-4, 0.1, device)
    if is_compiled:
        model = torch.compile(model)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    inputs = ModelInputs(device, shape["vocab_size"])(rows[:, :-1])
    return lambda: train_step(model, optimizers, [inputs], accelerator, max_grad_norm=1.0)


def plain_loop(peer: str, shape: dict, rows: torch.Tensor, device: torch.device, is_compiled: bool) -> Callable:
    if peer == "stock":
        model = GPT2LMHeadModel(GPT2Config(**shape, **NO_DROPOUT)).to(device).train()
    else:
        model = NanoGPT(**shape).to(device)
    optimizer = AdamW(model.parameters(), lr=6e-4, betas=ADAM_BETAS, weight_decay=0.1, fused=True)
    called = torch.compile(model) if is_compiled else model
    rows = rows.to(device)
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            if peer == "stock":
                loss = called(input_ids=inputs, labels=inputs, use_cache=False).loss
            else:
                loss = called(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def section(args: BenchmarkArguments, shape: str) -> str:
    """Markdown of one shape."""
    on_gpu = torch.cuda.is_available()
    batch_size = args.per_device_train_batch_size or BATCH_SIZES[shape]
    names = ["ours", "ours" + COMPILED]
    for peer in ("stock", "nanoGPT's"):
        names += [peer, peer + COMPILED] if on_gpu else [peer, peer + TUNED, peer + TUNED + COMPILED]
    flags = ["--shape", shape, "--per_device_train_batch_size", batch_size]
    measured = side_by_side.in_turns(__file__, names, args.rounds, *flags)
    rate = {name: side_by_side.median(measured, name, "tokens/s") for name in names}
    best, peer = max(names[:2], key=rate.__getitem__), max(names[2:], key=rate.__getitem__)
    limit = side_by_side.median(measured, "ours", "products' tokens/s")
    parts = [
        f"{shape}, {batch_size} rows of {SHAPES[shape]['n_positions']} tokens, medians of {args.rounds} rounds:",
        table_of(measured, shape, rate, best),
        f"The matrix products of a step alone, run one after the other in the processes of ours, are {limit:,.0f} "
        f'tokens/s, {limit / rate[peer]:.2f} times "{peer}": no step is faster.',
    ]
    if on_gpu and shape == "124M":
        parts.append(f"Of llm.c {LLM_C:,} tokens/s are quoted on one H100: ours is {rate[best] / LLM_C:.2f} of it.")
    return "\n\n".join(parts)


def table_of(measured: side_by_side.Measured, shape: str, rate: dict[str, float], best: str) -> str:
    flops = hardware.flops_per_token(*sizes(shape))
    peak = hardware.peak_flops(side_by_side.device())
    rows = side_by_side.medians(measured, {"tokens/s": ",.0f", "megabytes": ",.0f"})
    for name, row in zip(measured, rows, strict=True):
        if peak:
            row.append(f"{rate[name] * flops / peak:.1%}")
        faster = side_by_side.ratio(measured, best, name, "tokens/s")
        smaller = side_by_side.ratio(measured, best, name, "megabytes")
        row += ["", ""] if name.startswith("ours") else [f"{faster:.2f}", f"{smaller:.2f}"]
    header = ["", "tokens/s", "peak MB", *(["MFU"] if peak else []), f'"{best}" is so many times as fast', "takes"]
    return table(header, rows)


def sizes(shape: str) -> tuple[int, int, int, int]:
    config = GPT2ScratchConfig(**SHAPES[shape], **NO_DROPOUT)
    with torch.device("meta"):
        parameters = build_model(config, None, "sdpa", gradient_checkpointing=False).num_parameters()
    return parameters, config.n_layer, config.n_embd, config.n_positions


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    shapes = SHAPES if args.shape == "both" else [args.shape]
    sections = [section(args, shape) for shape in shapes]
    print("\n\n".join([side_by_side.here("torch", "transformers", "accelerate"), *sections]))


if __name__ == "__main__":
    run_script(main)
