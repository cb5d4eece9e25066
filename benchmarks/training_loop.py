"""
Measure what the loop of train_accelerate.py costs: data, logging, accumulation, clipping, checks and accelerate.

    python benchmarks/training_loop.py                                                  # on data/demo

The script itself, and a bare loop over the same model, rows and optimizer: autocast (with loss scaling in fp16),
backward, clip, step. Each runs in a process of its own, in turns. The time is that of all steps but the first ones,
which warm up.
"""

import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.data.training_data import open_packed
from pretraining.distributed.processes import open_state
from pretraining.markdown import table
from pretraining.optimization.optimizer import build_optimizer
from pretraining.records.metrics import read_metrics
from pretraining.text.sources import Source
from pretraining.training.model import attention_on, build_model, load_config

SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
WHOLE, BARE = "train_accelerate.py", "a bare loop"
WARM_UP = 20  # steps; a multiple of --logging_steps


@dataclass
class BenchmarkArguments:
    data_dir: str = flag("data/demo", "a data folder made by prepare_data.py, or token files of another project")
    tokenizer_name: str = flag(None, "the tokenizer, for token files of another project")
    block_size: int = flag(None, "tokens in a row; that of the data, or 1024, if left out")
    config_overrides: str = flag("n_layer=4,n_embd=256,n_head=4,n_positions=256", "the model")
    per_device_train_batch_size: int = flag(8, "rows of a micro-batch")
    gradient_accumulation_steps: int = flag(2, "micro-batches of a step")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    steps: int = flag(80, "steps that are timed")
    rounds: int = flag(5, "processes of each")
    measure: str = flag(None, "measure this one, in this process")


SHARED = """data_dir tokenizer_name block_size config_overrides per_device_train_batch_size
    gradient_accumulation_steps""".split()  # flags of train_accelerate.py too


def whole(args: BenchmarkArguments) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
        flags |= {"output_dir": folder, "max_steps": WARM_UP + args.steps, "eval_steps": 10_000, "save_steps": 10_000}
        flags |= {"eval_iters": 1, "report_to": "none", "optim": "adamw"}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": args.mixed_precision}
        result = subprocess.run([sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"train_accelerate.py ended with status {result.returncode}: {result.stderr}")
        lines = [line for line in read_metrics(Path(folder)) if "tokens_per_second" in line]
    (first,) = (line for line in lines if line["step"] == WARM_UP)
    tokens = lines[-1]["tokens"] - first["tokens"]
    seconds = lines[-1]["elapsed_seconds"] - first["elapsed_seconds"]
    # On an accelerator its memory is known to the process itself alone.
    on_cpu = side_by_side.device().type == "cpu"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 if on_cpu else math.nan
    return {"tokens/s": tokens / seconds, "megabytes": peak / 1e6}


def bare(args: BenchmarkArguments) -> dict[str, float]:
    device = side_by_side.device()
    if device.type == "cpu":
        hardware.keep_freed_memory()
    set_seed(42)
    data = open_packed([Source(data_dir=args.data_dir)], args.tokenizer_name, args.block_size, open_state())
    train, tokenizer = data.folders[0].train, data.tokenizer
    config = load_config(None, None, args.config_overrides, len(tokenizer), tokenizer.eos_token_id)
    attention = attention_on(device, args.mixed_precision, "sdpa")
    model = build_model(config, None, attention, gradient_checkpointing=False).to(device)
    optimizer = build_optimizer(model, "adamw", 6e-4, 0.1, device)
    scaler = side_by_side.loss_scaler(args.mixed_precision)
    order = itertools.cycle(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist())
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            side_by_side.synchronize()
            started = time.perf_counter()
        for _ in range(args.gradient_accumulation_steps):
            indices = list(itertools.islice(order, args.per_device_train_batch_size))
            rows = train.__getitems__(indices).to(device).long()
            with side_by_side.autocast(args.mixed_precision):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            scaler.scale(loss / args.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    loss.item()
    tokens = args.steps * args.gradient_accumulation_steps * rows.numel()
    return {"tokens/s": tokens / (time.perf_counter() - started), "megabytes": side_by_side.memory(peak=True)}


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    if args.measure:
        print(json.dumps({WHOLE: whole, BARE: bare}[args.measure](args)))
        return
    flags = [str(word) for name, value in asdict(args).items() if value is not None for word in (f"--{name}", value)]
    measured = side_by_side.in_turns(__file__, (WHOLE, BARE), args.rounds, *flags)
    formats = {"tokens/s": ",.0f"} | ({"megabytes": ",.0f"} if side_by_side.device().type == "cpu" else {})
    header = ["", "tokens/s", *(["peak MB"] if "megabytes" in formats else [])]
    print(
        side_by_side.section(
            ("torch", "transformers", "accelerate"),
            described(args) + f", medians of {args.rounds} rounds",
            table(header, side_by_side.medians(measured, formats)),
            f"The whole loop has {side_by_side.ratio(measured, WHOLE, BARE, 'tokens/s'):.3f} of the bare one's speed.",
        )
    )


def described(args: BenchmarkArguments) -> str:
    return (
        f"{args.config_overrides}, {args.gradient_accumulation_steps} micro-batches of "
        f"{args.per_device_train_batch_size} rows a step, {side_by_side.precision_name(args.mixed_precision)}, AdamW, "
        f"{args.steps} steps"
    )


if __name__ == "__main__":
    run_script(main)
