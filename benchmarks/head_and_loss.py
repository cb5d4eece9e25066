"""
The output head with its loss, forward and backward, in the forms that people write it.

    python benchmarks/head_and_loss.py

Each form runs in a process of its own, in turns: seconds are the median of its steps, memory is what it takes at most
beyond what was there before the first. The allocator is set alike for all (`hardware.keep_freed_memory`).
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch.linear_cross_entropy import linear_cross_entropy
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.markdown import table

OURS, EAGER, COMPILED = "linear_cross_entropy", "logits and cross_entropy", "the same, compiled"


@dataclass
class BenchmarkArguments:
    tokens: int = flag(16_384, "of a step")
    n_embd: int = flag(768, "the model's width")
    vocab_size: int = flag(50_257, "its vocabulary")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    steps: int = flag(2, "of which each process takes the median, after one to warm up")
    rounds: int = flag(5, "processes of each form")
    measure: str = flag(None, "measure this form, in this process")


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels)


def measure(args: BenchmarkArguments) -> dict[str, float]:
    device = side_by_side.device()
    if device.type == "cpu":
        hardware.keep_freed_memory()
    torch.manual_seed(0)
    forms: dict[str, Callable] = {OURS: linear_cross_entropy, EAGER: plain}
    form = forms[args.measure] if args.measure in forms else torch.compile(plain)
    hidden = torch.randn(args.tokens, args.n_embd, device=device, requires_grad=True)
    weight = torch.randn(args.vocab_size, args.n_embd, device=device).mul_(0.02).requires_grad_()
    labels = torch.randint(args.vocab_size, (args.tokens,), device=device)
    scaler = side_by_side.loss_scaler(args.mixed_precision)

    def step() -> None:
        hidden.grad = weight.grad = None
        with side_by_side.autocast(args.mixed_precision):
            loss = form(hidden, weight, labels)
        scaler.scale(loss).backward()

    if args.measure == COMPILED:
        step()  # the compiler's own memory is not the form's
        hidden.grad = weight.grad = None
    side_by_side.forget_peak_memory()
    before = side_by_side.memory()
    step()
    times = [side_by_side.seconds(step) for _ in range(args.steps)]
    return {"seconds": statistics.median(times), "megabytes": side_by_side.memory(peak=True) - before}


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    flags = ["--tokens", args.tokens, "--n_embd", args.n_embd, "--vocab_size", args.vocab_size, "--steps", args.steps]
    flags += ["--mixed_precision", args.mixed_precision]
    names = (OURS, EAGER, COMPILED)
    measured = side_by_side.in_turns(__file__, names, args.rounds, *flags)
    rows = side_by_side.medians(measured, {"seconds": ".3g", "megabytes": ",.0f"})
    for name, row in zip(names, rows, strict=True):
        faster = side_by_side.ratio(measured, name, OURS, "seconds")
        smaller = side_by_side.ratio(measured, OURS, name, "megabytes")
        row += ["", ""] if name == OURS else [f"{faster:.2f}", f"{smaller:.3f}"]
    header = ["form", "seconds", "peak MB", "ours is so many times as fast", "ours takes"]
    print(
        side_by_side.section(
            ["torch"],
            f"{described(args)}, medians of {args.rounds} rounds",
            table(header, rows),
        )
    )


def described(args: BenchmarkArguments) -> str:
    return (
        f"{args.tokens:,} tokens, width {args.n_embd}, vocabulary {args.vocab_size:,}, "
        f"{side_by_side.precision_name(args.mixed_precision)}{' autocast' if args.mixed_precision != 'no' else ''}"
    )


if __name__ == "__main__":
    run_script(main)
