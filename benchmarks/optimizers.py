"""
Measure how many tokens Muon needs to reach the final validation loss of AdamW, both with their best learning rate.

    python benchmarks/optimizers.py                                     # on data/demo, about an hour on one CPU core
    python benchmarks/optimizers.py --steps 800 --jobs 3 --work_dir runs/wide \\
        --config_overrides n_layer=4,n_embd=256,n_head=4,n_positions=256

Every run is train_accelerate.py in a process of its own. A learning rate that decays makes losses in the middle of a
run incomparable with those at an end, so each budget of tokens is a complete run with its own schedule, and the tokens
to a loss are interpolated between the ends of such runs. A learning rate that is best at the edge of its grid extends
the grid. Finished runs stay in --work_dir and are not repeated: the same command goes on where it was interrupted.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.errors import UserError
from pretraining.markdown import table
from pretraining.records.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
# Of AdamW's steps. Muon's learning rate is tuned at the budget hoped for, and kept at the others, which only costs it.
TUNED_AT = 0.7
BUDGETS = (0.12, 0.18, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
# Of a run's steps, long for AdamW's sake: 200 steps at 4e-3 end at 5.36, 5.21 and 4.51 with 0.05, 0.1 and 0.2, 400
# steps at 3.99 and 3.96 with 0.2 and 0.4. Muon does not mind: 3.77 with 0.1, 3.76 with 0.2, 280 steps at 6e-3.
WARMUP = 0.3
CURVE_POINTS = 8
NAMES = {"adamw": "AdamW", "muon": "Muon"}


@dataclass
class BenchmarkArguments:
    data_dir: str = flag("data/demo", "a data folder made by prepare_data.py")
    work_dir: str = flag("runs/optimizers", "the folder for the runs, of one model and one data folder")
    config_overrides: str = flag("n_layer=4,n_embd=128,n_head=4,n_positions=256", "the model")
    per_device_train_batch_size: int = flag(16, "rows in an optimizer step")
    steps: int = flag(400, "AdamW's optimizer steps")
    seeds: list[int] = flag([1, 2, 3], "each learning rate is run with all of them", nargs="+")
    adamw_learning_rates: list[float] = flag([4e-3, 8e-3, 1.6e-2], "AdamW's grid", nargs="+")
    muon_learning_rates: list[float] = flag([1.2e-2, 2.4e-2, 4.8e-2], "Muon's grid", nargs="+")
    eval_iters: int = flag(None, "see train_accelerate.py; all validation rows if left out")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    jobs: int = flag(1, "seeds that run at the same time")
    plot: str = flag("docs/optimizers.png", "the picture to write")

    def problems(self) -> list[str]:
        found = []
        if len(set(self.seeds)) < 2:
            found.append("--seeds needs two or more, to tell how much they differ")
        for name in ("adamw_learning_rates", "muon_learning_rates"):
            if len(set(getattr(self, name))) < 3:
                found.append(f"--{name} needs three or more: the best one has to lie between two others")
        if self.steps < 20 or self.jobs < 1:
            found.append("--steps must be at least 20 and --jobs at least 1")
        return found


def train(args: BenchmarkArguments, optim: str, learning_rate: float, steps: int, seed: int) -> list[tuple]:
    """One complete run, unless it is there already. Returns (tokens, validation loss) of its evaluations."""
    output_dir = Path(args.work_dir) / f"{optim}-{learning_rate:g}-{steps}-{seed}"
    if not (output_dir / "model.safetensors").exists():
        flags = {
            "data_dir": args.data_dir,
            "output_dir": output_dir,
            "config_overrides": args.config_overrides,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "optim": optim,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": round(WARMUP * steps),
            "max_steps": steps,
            "seed": seed,
            # One seed draws the curve; of the others only the end counts.
            "eval_steps": max(1, steps // CURVE_POINTS) if seed == args.seeds[0] else steps,
            "eval_iters": args.eval_iters,
            "save_steps": steps,
            "report_to": "none",
        }
        words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        result = subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            env={"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_MIXED_PRECISION": args.mixed_precision},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise UserError(f"{output_dir.name} ended with status {result.returncode}: {result.stderr[-2000:]}")
        print(f"{output_dir.name} is finished", file=sys.stderr, flush=True)
    return [(line["tokens"], line["eval_loss"]) for line in read_metrics(output_dir) if "eval_loss" in line]


def final_losses(args: BenchmarkArguments, optim: str, learning_rate: float, steps: int) -> list[float]:
    """The validation loss at the end of each seed's run."""
    with ThreadPoolExecutor(args.jobs) as pool:
        curves = list(pool.map(lambda seed: train(args, optim, learning_rate, steps, seed), args.seeds))
    return [curve[-1][1] for curve in curves]


def tune(args: BenchmarkArguments, optim: str, rates: list[float], steps: int) -> tuple[float, dict]:
    """The best learning rate, which has a worse one on either side, and all losses."""
    losses = {}
    while True:
        losses |= {rate: final_losses(args, optim, rate, steps) for rate in rates}
        best = min(losses, key=lambda rate: statistics.mean(losses[rate]))
        if min(losses) < best < max(losses):
            return best, dict(sorted(losses.items()))
        rates = [best / 2 if best == min(losses) else best * 2]


def budgets_around(args: BenchmarkArguments, rate: float, targets: list[float]) -> dict[int, list[float]]:
    """Muon's final losses by steps: from `TUNED_AT` down and up until every seed's target lies between two of them."""
    losses = {}

    def measure(budget: float) -> list[bool]:
        steps = round(budget * args.steps)
        losses[steps] = final_losses(args, "muon", rate, steps)
        return [loss <= target for loss, target in zip(losses[steps], targets, strict=True)]

    reached = measure(TUNED_AT)
    if any(reached):
        for budget in sorted((each for each in BUDGETS if each < TUNED_AT), reverse=True):
            if not any(measure(budget)):
                break
    if not all(reached):
        for budget in sorted(each for each in BUDGETS if each > TUNED_AT):
            if all(measure(budget)):
                break
    return dict(sorted(losses.items()))


def crossing(budgets: list[int], losses: list[float], target: float) -> float:
    """Where the loss falls to `target`, straight in the logarithm of the budget; infinite if it never does."""
    if losses[0] <= target:
        return budgets[0]  # at most so many
    for index in range(1, len(budgets)):
        if losses[index] <= target:
            part = (losses[index - 1] - target) / (losses[index - 1] - losses[index])
            return math.exp(math.log(budgets[index - 1]) * (1 - part) + math.log(budgets[index]) * part)
    return math.inf


def figures(optim: str, rate: float, tokens: int, losses: list[float]) -> list[str]:
    """A line of the table; the losses are the last ones of each seed."""
    mean, spread = statistics.mean(losses), statistics.stdev(losses)
    return [NAMES[optim], f"{rate:g}", f"{tokens:,}", f"{mean:.3f}", f"{spread:.3f}"]


def draw(path: Path, curves: dict[str, list[tuple]], ends: dict[int, list[float]], target: float) -> None:
    """
    Args:
        curves: (tokens, validation loss) of runs, by label; the first is AdamW's.
        ends: the losses of all seeds at the ends of Muon's budgets, by tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(target, color="tab:gray", linestyle="--", label="AdamW's final loss")
    for index, (label, curve) in enumerate(curves.items()):
        color = "tab:orange" if index else "tab:blue"
        style = ("-", "-", "--", "-.", ":")[index % 5]
        axes.plot(*zip(*curve, strict=True), style, color=color, marker=".", linewidth=1.2, label=label)
    points = [(tokens, loss) for tokens, losses in ends.items() for loss in losses]
    axes.plot(*zip(*points, strict=True), "o", color="tab:red", markersize=5, label="Muon's budgets, all seeds")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check_work_dir(args: BenchmarkArguments) -> None:
    """Names of runs do not tell the model and the data, so a folder belongs to one of each."""
    names = "data_dir config_overrides per_device_train_batch_size eval_iters mixed_precision"
    given, path = {name: getattr(args, name) for name in names.split()}, Path(args.work_dir) / "benchmark.json"
    if path.exists() and json.loads(path.read_text()) != given:
        raise UserError(f"--work_dir {args.work_dir} holds runs of {path.read_text()}: choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given))


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    args.mixed_precision = side_by_side.precision(args.mixed_precision)
    check_work_dir(args)
    adamw_rate, adamw = tune(args, "adamw", args.adamw_learning_rates, args.steps)
    tuned_steps = round(TUNED_AT * args.steps)
    muon_rate, muon = tune(args, "muon", args.muon_learning_rates, tuned_steps)
    targets = adamw[adamw_rate]
    budgets = budgets_around(args, muon_rate, targets)

    steps, seeds = list(budgets), range(len(targets))
    by_seed = [crossing(steps, [budgets[each][seed] for each in steps], targets[seed]) / args.steps for seed in seeds]
    target, means = statistics.mean(targets), [statistics.mean(losses) for losses in budgets.values()]
    ratio = crossing(steps, means, target) / args.steps

    curves = {f"AdamW, {adamw_rate:g}": train(args, "adamw", adamw_rate, args.steps, args.seeds[0])}
    tokens_per_step = curves[f"AdamW, {adamw_rate:g}"][-1][0] // args.steps
    for each in reversed(steps):
        curves[f"Muon, {muon_rate:g}, {each} steps"] = train(args, "muon", muon_rate, each, args.seeds[0])
    draw(Path(args.plot), curves, {each * tokens_per_step: losses for each, losses in budgets.items()}, target)

    rows = [("adamw", rate, args.steps * tokens_per_step, losses) for rate, losses in adamw.items()]
    rows += [("muon", rate, tuned_steps * tokens_per_step, losses) for rate, losses in muon.items()]
    rows += [("muon", muon_rate, each * tokens_per_step, budgets[each]) for each in steps if each != tuned_steps]
    header = ["optimizer", "peak learning rate", "tokens", "validation loss", "spread"]
    print(
        side_by_side.section(
            ("torch", "transformers", "accelerate"),
            f"{args.config_overrides}, {tokens_per_step:,} tokens a step, "
            f"{side_by_side.precision_name(args.mixed_precision)}, warm-up over {WARMUP:.0%} of a run's steps "
            f"and linearly to zero; mean and standard deviation over {len(args.seeds)} seeds",
            table(header, (figures(*row) for row in rows)),
            f"Muon needs {ratio:.3f} of AdamW's tokens to reach its final loss of {target:.3f}; seed by seed "
            f"{', '.join(f'{each:.3f}' for each in by_seed)} (standard deviation {statistics.stdev(by_seed):.3f}).",
        )
    )


if __name__ == "__main__":
    run_script(main)
