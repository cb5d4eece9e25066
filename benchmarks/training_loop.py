"""
What the loop of train_accelerate.py costs: data, logging, accumulation, clipping, checks and accelerate.

    python benchmarks/training_loop.py                                                  # on data/demo

The script itself, and a bare loop over the same model, rows and optimizer: autocast, backward, clip, step. Each runs
in a process of its own, in turns. The time is that of all steps but the first ones, which warm up.
"""

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
from pretraining.arguments import flag, parse_arguments, run_script
from pretraining.data import open_data_folder
from pretraining.markdown import table
from pretraining.metrics import read_metrics
from pretraining.models import attention_on, build_model, load_config
from pretraining.optim import build_optimizers
from pretraining.tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
WHOLE, BARE = "train_accelerate.py", "a bare loop"
WARM_UP = 20  # steps; a multiple of --logging_steps


@dataclass
class BenchmarkArguments:
    data_dir: str = flag("data/demo", "a data folder made by prepare_data.py")
    config_overrides: str = flag("n_layer=4,n_embd=256,n_head=4,n_positions=256", "the model")
    per_device_train_batch_size: int = flag(8, "rows of a micro-batch")
    gradient_accumulation_steps: int = flag(2, "micro-batches of a step")
    steps: int = flag(80, "steps that are timed")
    rounds: int = flag(5, "processes of each")
    measure: str = flag(None, "measure this one, in this process")


def whole(args: BenchmarkArguments) -> dict[str, float]:
    names = ("data_dir", "config_overrides", "per_device_train_batch_size", "gradient_accumulation_steps")
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(args, name) for name in names}
        flags |= {"output_dir": folder, "max_steps": WARM_UP + args.steps, "eval_steps": 10_000, "save_steps": 10_000}
        flags |= {"eval_iters": 1, "report_to": "none", "optim": "adamw"}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        environment = {"ACCELERATE_MIXED_PRECISION": "bf16", **os.environ}
        subprocess.run([sys.executable, SCRIPT, *words], check=True, env=environment, capture_output=True)
        lines = [line for line in read_metrics(Path(folder)) if "tokens_per_second" in line]
    (first,) = (line for line in lines if line["step"] == WARM_UP)
    tokens = lines[-1]["tokens"] - first["tokens"]
    seconds = lines[-1]["elapsed_seconds"] - first["elapsed_seconds"]
    # On a GPU its memory is known to the process itself alone.
    peak = math.nan if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"tokens/s": tokens / seconds, "megabytes": peak / 1e6}


def bare(args: BenchmarkArguments) -> dict[str, float]:
    device = side_by_side.device()
    if device.type == "cpu":
        hardware.keep_freed_memory()
    set_seed(42)
    train, tokenizer = open_data_folder(Path(args.data_dir)).train, load_tokenizer(Path(args.data_dir) / "tokenizer")
    config = load_config(None, None, args.config_overrides, len(tokenizer), tokenizer.eos_token_id)
    model = build_model(config, None, attention_on(device, "bf16", "sdpa"), gradient_checkpointing=False).to(device)
    (optimizer,) = build_optimizers(model, "adamw", 6e-4, 0.1, device)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    size, taken = args.per_device_train_batch_size, 0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            side_by_side.synchronize()
            started = time.perf_counter()
        for _ in range(args.gradient_accumulation_steps):
            rows = train.__getitems__(order[taken : taken + size]).to(device).long()
            taken += size
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            (loss / args.gradient_accumulation_steps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
    tokens = args.steps * args.gradient_accumulation_steps * rows.numel()
    return {"tokens/s": tokens / (time.perf_counter() - started), "megabytes": side_by_side.memory(peak=True)}


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if args.measure:
        print(json.dumps({WHOLE: whole, BARE: bare}[args.measure](args)))
        return
    flags = [str(word) for name, value in asdict(args).items() if value is not None for word in (f"--{name}", value)]
    measured = side_by_side.in_turns(__file__, (WHOLE, BARE), args.rounds, *flags)
    rows = side_by_side.medians(measured, {"tokens/s": ",.0f", "megabytes": ",.0f"})
    speed = side_by_side.ratio(measured, WHOLE, BARE, "tokens/s")
    print(
        side_by_side.section(
            ("torch", "transformers", "accelerate"),
            f"{args.config_overrides}, {args.gradient_accumulation_steps} micro-batches of "
            f"{args.per_device_train_batch_size} rows a step, bf16, AdamW, {args.steps} steps, medians of "
            f"{args.rounds} rounds",
            table(["", "tokens/s", "peak MB"], rows),
            f"The whole loop has {speed:.3f} of the bare one's speed.",
        )
    )


if __name__ == "__main__":
    run_script(main)
