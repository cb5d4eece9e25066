"""
How long a checkpoint of GPT-2 124M stalls training, and what of it is hashing.

    python benchmarks/checkpoints.py --output_dir /tmp/checkpoints

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

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.arguments import flag, parse_arguments, run_script
from pretraining.checkpoint import CheckpointWriter, LoopState, generator_states, load_checkpoint
from pretraining.checkpoint_folders import checkpoint_folder, verify
from pretraining.files import sha256_of
from pretraining.optim import build_optimizers


@dataclass
class BenchmarkArguments:
    output_dir: str = flag("checkpoints-benchmark", "a folder on the disk that is to be measured; deleted at the end")
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    rounds: int = flag(7, "how often")


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    disable_progress_bar()
    if not torch.cuda.is_available():
        hardware.keep_freed_memory()
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(args.config_name)).train()
    optimizers = build_optimizers(model, "adamw", 6e-4, 0.1, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    rows = torch.randint(0, model.config.vocab_size, (1, 256), device=accelerator.device)

    def step() -> None:
        accelerator.backward(model(rows, labels=rows, use_cache=False).loss)
        optimizers[0].step()
        optimizers[0].zero_grad()

    seconds: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return seconds[name][-1]

    step()  # makes the moments
    writer = CheckpointWriter(accelerator, output_dir, model, optimizers, save_total_limit=2)
    for number in range(1, args.rounds + 1):
        usual = statistics.median(measure("step", step) for _ in range(5))
        state = LoopState({"step": number}, None, generator_states(accelerator.device))
        measure("stall", partial(writer.save, state))
        started, steps = time.perf_counter(), 0
        while writer.is_writing():
            step()
            steps += 1
        seconds.setdefault("slowed", []).append(time.perf_counter() - started - steps * usual)
        seconds.setdefault("written", []).append(time.perf_counter() - started)
        writer.wait()
        folder = checkpoint_folder(output_dir, number)
        measure("hashing", partial(hash_all, folder))
        measure("verify", partial(verify, folder))
        measure("load", partial(load_checkpoint, accelerator, folder, model, optimizers))
        measure("plain write", partial(plain_write, model, optimizers[0], output_dir))
    size = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(output_dir)
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        for name, values in seconds.items()
    ]
    print(
        side_by_side.section(
            ("torch", "accelerate", "safetensors"),
            f"{args.config_name} with AdamW's state, {size / 1e9:.2f} GB, {args.rounds} checkpoints",
            side_by_side.table(["seconds", "median", "range"], rows),
        )
    )


def hash_all(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sha256_of, folder.iterdir()))


def plain_write(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights = dict(model.named_parameters())  # tied weights once
    save_file({name: weight.detach() for name, weight in weights.items()}, folder / "plain.safetensors")
    torch.save(optimizer.state_dict(), folder / "plain.pt")


if __name__ == "__main__":
    run_script(main)
