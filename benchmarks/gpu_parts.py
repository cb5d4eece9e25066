"""The measurements of gpu.py. Each prints Markdown, line by line as it is known."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils.logging import disable_progress_bar

from benchmarks import generation as generating
from benchmarks import head_and_loss as head
from benchmarks import hellaswag as scoring
from benchmarks import side_by_side, synthetic
from benchmarks import training_step as steps
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.errors import counted
from pretraining.markdown import table
from pretraining.optimization.optimizer import Optim
from train_accelerate import train_step

PEERS = (steps.NANOGPT, steps.STOCK)


@dataclass(frozen=True)
class Scale:
    """
    Sizes of the model and of each measurement.

    Attributes:
        first_rows, most_rows: batch sizes to begin and to end with, if memory is not full before.
        common_rows: the batch size at which programs are compared, if it fits.
        compiles: whether compiled programs are measured too.
        loop_rows, loop_steps: of a micro-batch, and that are timed, in the part about the whole loop.
        batch_sizes, prompt_tokens, new_tokens: of generation.
    """

    name: str
    shape: steps.Shape
    first_rows: int
    common_rows: int
    most_rows: int
    timed_steps: int
    compiles: bool
    loop_rows: int
    loop_steps: int
    head_tokens: int
    items: int
    rounds: int
    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


GPT2 = Scale(
    name="GPT-2 124M",
    shape=steps.SHAPES["124M"],
    first_rows=4,
    common_rows=32,
    most_rows=1024,
    timed_steps=5,
    compiles=True,
    loop_rows=8,
    loop_steps=60,
    head_tokens=16_384,
    items=200,
    rounds=3,
    batch_sizes=(1, 8),
    prompt_tokens=32,
    new_tokens=64,
)
TINY = Scale(
    name="a tiny GPT-2",
    shape={"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": 1024},
    first_rows=1,
    common_rows=1,
    most_rows=2,
    timed_steps=2,
    compiles=False,
    loop_rows=1,
    loop_steps=10,
    head_tokens=64,
    items=4,
    rounds=1,
    batch_sizes=(2,),
    prompt_tokens=4,
    new_tokens=8,
)


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def start_table(*header: str) -> None:
    say("", table(header, []))


def say_row(*cells: object) -> None:
    say(table(map(str, cells), []).splitlines()[0])


class StepTable:
    """Tables of training steps, whose rows are measured and printed one by one."""

    def __init__(self, scale: Scale, mixed_precision: str):
        self.scale = scale
        self.mixed_precision = mixed_precision
        self.figures: dict[tuple[str, int], dict[str, float] | None] = {}

    def start(self, title: str) -> None:
        say("", f"{title}:")
        start_table("program", "rows", "tokens/s", "peak MB", "MFU")

    def fits(self, name: str, rows: int) -> bool:
        """Measure a program with so many rows, unless that is done. Returns False if it does not fit into memory."""
        if (name, rows) not in self.figures:
            figures = self.figures[name, rows] = self._measure(name, rows)
            if figures is None:
                say_row(name, rows, "out of memory", "", "")
            else:
                rate = figures["tokens/s"]
                share = steps.model_flops_utilisation(self.scale.shape, self.mixed_precision, rate)
                cells = f"{rate:,.0f}", f"{figures['megabytes']:,.0f}", "" if share is None else f"{share:.1%}"
                say_row(name, rows, *cells)
        return self.figures[name, rows] is not None

    def fill_memory(self, name: str, rows: int) -> int:
        """Double the rows until memory is full. Returns the largest number that fits, 0 if none does."""
        largest = 0
        while rows <= self.scale.most_rows and self.fits(name, rows):
            largest, rows = rows, 2 * rows
        return largest

    def ratio(self, name: str, other: str, rows: int, figure: str) -> float:
        ours, theirs = self.figures[name, rows], self.figures[other, rows]
        assert ours and theirs
        return ours[figure] / theirs[figure]

    def best_rate(self, program: str) -> float:
        return max(
            figures["tokens/s"] for (name, _), figures in self.figures.items() if figures and name.startswith(program)
        )

    def compare(self, rows: int, suffix: str = "") -> None:
        """Print how fast ours is, and how much memory it takes, compared with its peers."""
        parts = []
        for peer in PEERS:
            speed = self.ratio(steps.OURS + suffix, peer + suffix, rows, "tokens/s")
            memory = self.ratio(steps.OURS + suffix, peer + suffix, rows, "megabytes")
            parts.append(f"{speed:.2f} times as fast as {peer} in {memory:.2f} of its memory")
        say("", f"With {counted(rows, 'row')}{suffix and suffix + ','} ours is {' and '.join(parts)}.")

    def _measure(self, name: str, rows: int) -> dict[str, float] | None:
        program, is_compiled = name.removesuffix(steps.COMPILED), name.endswith(steps.COMPILED)
        if is_compiled:
            torch.compiler.reset()
        side_by_side.forget_peak_memory()
        step = figures = None
        try:
            step = steps.build_step(program, self.scale.shape, rows, self.mixed_precision, is_compiled)
            figures = steps.speed(step, self.scale.shape, rows, self.scale.timed_steps)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        step = None  # what it holds is freed
        clear_device_cache(garbage_collection=True)
        return figures


def training_step(scale: Scale) -> None:
    mixed_precision = side_by_side.precision(None)
    steps_table = StepTable(scale, mixed_precision)
    say(side_by_side.here("torch", "transformers", "accelerate"), "")
    say(
        f"{scale.name}, rows of {scale.shape['n_positions']} tokens, "
        f"{side_by_side.precision_name(mixed_precision)}, AdamW, medians of {scale.timed_steps} steps."
    )
    steps_table.start("Eager, ours until memory is full")
    largest = steps_table.fill_memory(steps.OURS, scale.first_rows)
    rows = min(scale.common_rows, largest or scale.first_rows)
    while not all(steps_table.fits(name, rows) for name in (steps.OURS, *PEERS)):
        rows //= 2
    steps_table.compare(rows)
    limit = rows * scale.shape["n_positions"] / steps.seconds_of_products(scale.shape, rows, mixed_precision)
    clear_device_cache(garbage_collection=True)
    say("", f"The matrix products of this step alone are {limit:,.0f} tokens/s: no step is faster.")
    optimizer_shares(scale, rows, mixed_precision)
    if scale.compiles:
        steps_table.start("Compiled")
        fitting = [steps_table.fits(name + steps.COMPILED, rows) for name in (steps.OURS, *PEERS)]
        if all(fitting):
            steps_table.compare(rows, steps.COMPILED)
    else:
        say("", "Compiled programs are left out of a dry run.")
    if scale.shape == steps.SHAPES["124M"]:
        say("", steps.beside_llm_c(steps_table.best_rate(steps.OURS)))
    steps_table.start("Eager, the others until memory is full")
    for peer in PEERS:
        steps_table.fill_memory(peer, 2 * rows)


def optimizer_shares(scale: Scale, rows: int, mixed_precision: str) -> None:
    say("", f"The optimizer's part of a step of ours, eager, {counted(rows, 'row')}:")
    start_table("optimizer", "step, ms", "optimizer, ms", "its share")
    for optim in get_args(Optim):
        step, update = seconds_of_optimizer(optim, scale, rows, mixed_precision)
        say_row(
            {"adamw": "AdamW", "muon": "Muon"}[optim],
            f"{1000 * step:.1f}",
            f"{1000 * update:.2f}",
            f"{update / step:.1%}",
        )
        clear_device_cache(garbage_collection=True)


def seconds_of_optimizer(optim: Optim, scale: Scale, rows: int, mixed_precision: str) -> tuple[float, float]:
    """Return the median seconds of a training step, and of the optimizer's update in it."""
    torch.manual_seed(0)
    ids = torch.randint(scale.shape["vocab_size"], (rows, scale.shape["n_positions"]))
    model, optimizer, micro_batches, accelerator = steps.build_ours(scale.shape, ids, mixed_precision, False, optim)
    updates: list[float] = []
    update = optimizer.step

    def timed_update() -> None:
        updates.append(side_by_side.seconds(update))

    optimizer.step = timed_update
    step = partial(train_step, model, optimizer, micro_batches, accelerator, max_grad_norm=1.0)
    while (
        len(updates) < steps.WARM_UP_STEPS
    ):  # in fp16 the first updates may be left out, while the scale is too large
        step()
    updates.clear()
    seconds = [side_by_side.seconds(step) for _ in range(scale.timed_steps)]
    return statistics.median(seconds), statistics.median(updates)


def training_loop(scale: Scale) -> None:
    from benchmarks import training_loop as loop  # here: it imports all that reads training data

    block_size = scale.shape["n_positions"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = synthetic.write_token_files(Path(folder), 2048 * block_size, 64 * block_size)
        args = loop.BenchmarkArguments(
            data_dir=folder,
            tokenizer_name=str(tokenizer),
            block_size=block_size,
            config_overrides=",".join(f"{name}={value}" for name, value in scale.shape.items()),
            per_device_train_batch_size=scale.loop_rows,
            gradient_accumulation_steps=4,
            mixed_precision=side_by_side.precision(None),
            steps=scale.loop_steps,
        )
        say(f"{loop.described(args)}, eager:")
        start_table("", "tokens/s")
        rates = {}
        for name, run in ((loop.WHOLE, loop.whole), (loop.BARE, loop.bare)):
            rates[name] = run(args)["tokens/s"]
            say_row(name, f"{rates[name]:,.0f}")
    say("", f"The whole loop has {rates[loop.WHOLE] / rates[loop.BARE]:.3f} of the bare one's speed.")


def head_and_loss(scale: Scale) -> None:
    args = head.BenchmarkArguments(
        tokens=scale.head_tokens,
        n_embd=scale.shape["n_embd"],
        vocab_size=scale.shape["vocab_size"],
        mixed_precision=side_by_side.precision(None),
        steps=scale.timed_steps,
    )
    say(f"{head.described(args)}:")
    start_table("form", "ms", "peak MB")
    for form in (head.OURS, head.EAGER, *([head.COMPILED] if scale.compiles else [])):
        figures = head.measure(replace(args, measure=form))
        say_row(form, f"{1000 * figures['seconds']:.2f}", f"{figures['megabytes']:,.0f}")
        clear_device_cache(garbage_collection=True)


def hellaswag(scale: Scale) -> None:
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig(**scale.shape, bos_token_id=0, eos_token_id=0))
    model = model.to(side_by_side.device()).eval()
    items, precision = synthetic.hellaswag_items(scale.items), side_by_side.precision(None)
    batch_size, rounds = min(8, scale.items), scale.rounds
    say(f"{scale.name}, {scale.items} made-up items, {batch_size} at once, medians of {counted(rounds, 'round')}:")
    say("", scoring.compare(model, synthetic.build_tokenizer(), items, batch_size, precision, False, rounds))


def generation(scale: Scale) -> None:
    disable_progress_bar()
    config = GPT2ScratchConfig(**scale.shape, bos_token_id=0, eos_token_id=0)
    say(f"{scale.name}, {scale.new_tokens} new tokens after {scale.prompt_tokens}, greedy:")
    start_table("precision", *generating.HEADER, "the same tokens")
    for precision in dict.fromkeys(("no", side_by_side.precision(None))):
        names = (generating.OURS, generating.STOCK)
        models = {name: generating.build(name, config, precision) for name in names}
        for rows in scale.batch_sizes:
            measured = {
                name: [generating.speed(model, rows, scale.prompt_tokens, scale.new_tokens)]
                for name, model in models.items()
            }
            same = "yes" if generating.is_same_text(measured) else "no"
            say_row(side_by_side.precision_name(precision), *generating.row_of(measured, rows), same)


PARTS: dict[str, Callable[[Scale], None]] = {
    "Training step": training_step,
    "The whole loop": training_loop,
    "Head and loss": head_and_loss,
    "HellaSwag": hellaswag,
    "Generation": generation,
}
