"""
How long a checkpoint of GPT-2 124M stalls training, and what of it is hashing.

    python benchmarks/checkpoints.py --output_dir /tmp/checkpoints

Saves and loads one with AdamW's state (1.5 GB) `--rounds` times, through the code that the training loop calls, and
prints medians in seconds. `stall` is what training waits for; `written` is how long after that the thread is done,
with nothing else to do on the machine; `hashing` is the sha256 of all files by itself, on two threads as there. `plain
write` is safetensors and torch.save alone, without flushing to the disk, hashing or renaming.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(args.config_name))
    optimizers = build_optimizers(model, "adamw", 6e-4, 0.1, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()  # makes the moments

    seconds: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    writer = CheckpointWriter(accelerator, output_dir, model, optimizers, save_total_limit=2)
    for step in range(1, args.rounds + 1):
        position = {"step": step}
        state = LoopState(position, None, generator_states(accelerator.device))
        measure("stall", lambda s=state: writer.save(s))
        measure("written", writer.wait)
        folder = checkpoint_folder(output_dir, step)
        measure("hashing", lambda f=folder: hash_all(f))
        measure("verify", lambda f=folder: verify(f))
        measure("load", lambda f=folder: load_checkpoint(accelerator, f, model, optimizers))
        measure("plain write", lambda: plain_write(model, optimizers[0], output_dir))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{args.config_name}, {size / 1e9:.2f} GB, {hardware.device_description(accelerator.device, 1)}")
    for name, values in seconds.items():
        print(f"{name:12} {statistics.median(values):6.2f}   ({', '.join(f'{value:.2f}' for value in values)})")
    shutil.rmtree(output_dir)


def hash_all(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sha256_of, folder.iterdir()))


def plain_write(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights = dict(model.named_parameters())  # tied weights once
    save_file({name: weight.detach() for name, weight in weights.items()}, folder / "plain.safetensors")
    torch.save(optimizer.state_dict(), folder / "plain.pt")


if __name__ == "__main__":
    run_script(main)
