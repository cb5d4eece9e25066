"""
Measure how long a checkpoint of GPT-2 124M stalls training, and how much of it is hashing.

    python benchmarks/checkpoints.py --output_dir /tmp

Saves and loads one with AdamW's state (1.5 GB) `--rounds` times, through the code that the training loop calls, and
prints medians of these, in seconds:

    step          forward and backward pass of a row, and AdamW's update, while nothing is written
    stall         what training waits for when a checkpoint is due
    slowed        what steps take longer in all while the thread writes, beside the stall
    written       from the end of the stall until the checkpoint is whole, with training going on
    hashing       of that, the sha256 of all files, by itself
    verify, load  what a start takes that goes on from it
    plain write   safetensors and torch.save alone, not flushed to the disk, hashed or renamed
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig
from pretraining import hardware
from pretraining.checkpoints.checkpoint import CheckpointWriter, load_checkpoint
from pretraining.checkpoints.folders import checkpoint_folder, verify
from pretraining.checkpoints.state import Position
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.distributed.processes import open_accelerator, open_state
from pretraining.files import sha256_of
from pretraining.markdown import table
from pretraining.optimization.optimizer import build_optimizer
from pretraining.training.model import attention_on, build_model


@dataclass
class BenchmarkArguments:
    output_dir: str = flag(".", "a folder on the disk that is to be measured")
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    rounds: int = flag(7, "how often")


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    disable_progress_bar()
    if side_by_side.device().type == "cpu":
        hardware.keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        seconds, size = measure(args, Path(folder))
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        for name, values in seconds.items()
    ]
    print(
        side_by_side.section(
            ("torch", "accelerate", "safetensors"),
            f"{args.config_name} with AdamW's state, {size / 1e9:.2f} GB, trained in "
            f"{side_by_side.precision_name(args.mixed_precision)}, {args.rounds} checkpoints",
            table(["seconds", "median", "range"], rows),
        )
    )


def measure(args: BenchmarkArguments, output_dir: Path) -> tuple[dict[str, list[float]], int]:
    """Return seconds of everything, by its name, and the size of a checkpoint in bytes."""
    accelerator = open_accelerator(open_state(), 1, False, args.mixed_precision)
    attention = attention_on(accelerator.device, args.mixed_precision, "sdpa")
    config = GPT2ScratchConfig.from_preset(args.config_name)
    model = build_model(config, None, attention, gradient_checkpointing=False)
    optimizer = build_optimizer(model, "adamw", 6e-4, 0.1, accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    row = torch.randint(0, model.config.vocab_size, (1, 256), device=accelerator.device)
    seconds: dict[str, list[float]] = defaultdict(list)

    def step() -> None:
        accelerator.backward(model(row, labels=row, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()

    def timed(name: str, work: Callable[[], object]) -> float:
        seconds[name].append(side_by_side.seconds(work))
        return seconds[name][-1]

    step()  # makes the moments
    with CheckpointWriter(accelerator, output_dir, model, optimizer, save_total_limit=2) as writer:
        for number in range(1, args.rounds + 1):
            usual = statistics.median(timed("step", step) for _ in range(5))
            generators = hardware.generator_states(accelerator.device)
            position = Position(number, 0.0, False, {}, {"recent": []}, [None], generators)
            timed("stall", partial(writer.save, position))
            started, steps = time.perf_counter(), 0
            while writer.is_writing():
                step()
                steps += 1
            side_by_side.synchronize()
            seconds["slowed"].append(time.perf_counter() - started - steps * usual)
            seconds["written"].append(time.perf_counter() - started)
            writer.wait()
            folder = checkpoint_folder(output_dir, number)
            timed("hashing", partial(hash_all, folder))
            timed("verify", partial(verify, folder))
            timed("load", partial(load_checkpoint, accelerator, folder, model, optimizer))
            timed("plain write", partial(plain_write, model, optimizer, output_dir))
    return seconds, sum(path.stat().st_size for path in folder.iterdir())


def hash_all(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sha256_of, folder.iterdir()))


def plain_write(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights = dict(model.named_parameters())  # tied weights once
    save_file({name: weight.detach() for name, weight in weights.items()}, folder / "plain.safetensors")
    torch.save(optimizer.state_dict(), folder / "plain.pt")


if __name__ == "__main__":
    run_script(main)
