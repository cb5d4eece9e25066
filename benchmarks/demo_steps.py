"""
Print how many steps `make train` takes on this machine.

    python benchmarks/demo_steps.py

It times a few steps of the demo, on random tokens, and takes as many as fit into `MINUTES`, evaluations counted in: at
most what the recipe says, and at least what brings the model below xz. A run that has begun keeps its number.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.data.data_folder import read_data_folder
from pretraining.data.packed_rows import ModelInputs
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import open_accelerator, open_state
from pretraining.optimization.optimizer import build_optimizer
from pretraining.precision import choose_precision, muon_dtype
from pretraining.records.run_files import TRAINING_ARGS
from pretraining.training.flags import TrainArguments
from pretraining.training.model import attention_on, build_model, load_config
from train_accelerate import train_step

MINUTES = 8
FEWEST = 250  # docs/experiments.md: 250 steps end at 1.46 bits per byte, xz needs 1.57
EVALUATIONS = 1.15  # an evaluation, every 100 steps, takes as long as some 13 of them
WARM_UP, TIMED = 2, 4


@dataclass
class BenchmarkArguments:
    recipe: str = flag("configs/demo.yaml", "what would be trained")


def seconds_of_step(args: TrainArguments) -> float:
    """Time an optimizer step of the recipe with the device and the precision that training would choose."""
    state = open_state()
    if state.device.type == "cpu":
        hardware.keep_freed_memory()
    precision = choose_precision(state.device, told_precision()).mixed_precision
    accelerator = open_accelerator(state, 1, args.torch_compile, precision)
    data = read_data_folder(Path(args.data_dir))
    config = load_config(None, args.config_name, args.config_overrides, data["tokenizer"]["vocab_size"], 0)
    attention = attention_on(state.device, precision, args.attn_implementation)
    model = build_model(config, None, attention, args.gradient_checkpointing)
    dtype = muon_dtype(state.device, precision)
    optimizer = build_optimizer(model, args.optim, args.learning_rate, args.weight_decay, state.device, dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = torch.randint(config.vocab_size, (args.tokens_per_step // data["block_size"], data["block_size"]))
    inputs = ModelInputs(state.device, config.vocab_size)(rows)

    def step() -> None:
        train_step(model, optimizer, [inputs], accelerator, args.max_grad_norm)

    for _ in range(WARM_UP):
        step()
    return statistics.median(side_by_side.seconds(step) for _ in range(TIMED))


def steps_for(seconds: float, most: int) -> int:
    """Return how many steps of so many seconds fit, in tens."""
    fitting = int(MINUTES * 60 / (seconds * EVALUATIONS)) // 10 * 10
    return min(most, max(FEWEST, fitting))


def main() -> None:
    recipe = parse_arguments(BenchmarkArguments, __doc__).recipe
    args = parse_arguments(TrainArguments, "", ["--config", recipe])
    begun = Path(args.output_dir) / TRAINING_ARGS
    if begun.exists():
        print(yaml.safe_load(begun.read_text())["max_steps"])
        return
    seconds = seconds_of_step(args)
    steps = steps_for(seconds, args.max_steps)
    minutes = steps * seconds * EVALUATIONS / 60
    print(f"a step takes {seconds:.2f} seconds: {steps} steps, about {minutes:.0f} minutes", file=sys.stderr)
    print(steps)


if __name__ == "__main__":
    run_script(main)
