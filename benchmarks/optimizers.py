"""
Compare recipes for the optimizer: the tokens that each needs to reach the final validation loss of AdamW.

    python benchmarks/optimizers.py                              # on data/demo, some three hours on one CPU core
    python benchmarks/optimizers.py --rungs adamw muon normuon   # some of `RUNGS`
    python benchmarks/optimizers.py --rungs adamw muon best --work_dir runs/wide --steps 800 \\
        --config_overrides n_layer=4,n_embd=256,n_head=4,n_positions=256

Every run is train_accelerate.py in a process of its own. A learning rate that decays makes losses in the middle of a
run incomparable with those at an end, so each budget of tokens is a complete run with its own schedule, and the tokens
to a loss are interpolated between the ends of such runs. Each rung has a peak learning rate of its own: the best one
for a seed that is not among those reported, with a worse one on either side. The rungs of AdamW are trained on all
tokens, and the best of them sets the loss that the others have to reach. Finished runs stay in --work_dir and are not
repeated: the same command resumes where it was interrupted.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.errors import UserError
from pretraining.markdown import table
from pretraining.records.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
TUNING_SEED = 0
# Of AdamW's steps: where the other rungs are tuned and compared, and where the crossing is looked for.
TUNED_AT = 0.4
BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
STEP = 2  # between two learning rates


@dataclass(frozen=True)
class Rung:
    """
    A recipe.

    Attributes:
        title: what makes it different, for the table.
        learning_rate: where the search for the best one begins.
        flags: of train_accelerate.py, beside those of `train`. `warmup` is a part of the run's steps.
    """

    title: str
    learning_rate: float
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adamw(self) -> bool:
        return self.flags.get("optim") == "adamw"


def adamw(title: str, learning_rate: float = 8e-3, **flags: Any) -> Rung:
    return Rung(title, learning_rate, {"optim": "adamw", "warmup": 0.3, **flags})


def muon(title: str, learning_rate: float = 2.4e-2, **flags: Any) -> Rung:
    return Rung(title, learning_rate, {"optim": "muon", "warmup": 0.3, **flags})


# Of settings that help together; `RUNGS` has each of them without the others.
BEST = {"warmup": 0.03, "adam_beta1": 0.8, "adam_beta2": 0.99, "optim_args": "embedding_lr=3,muon_scale=spectral"}
WIDE = {"config_overrides": "initializer_range=0.06"}
UNTIED = {"config_overrides": "tie_word_embeddings=false"}
TUNED = {"warmup": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.99, "optim_args": "embedding_lr=3"}
RUNGS = {
    "adamw": adamw("AdamW"),
    "adamw_tuned": adamw("AdamW, tuned", **TUNED),
    "adamw_tuned_wide": adamw("AdamW, tuned, wide init", **TUNED, **WIDE),
    "adamw_untied": adamw("AdamW, tuned, head of its own", **{**TUNED, "optim_args": "embedding_lr=30"}, **UNTIED),
    "muon": muon("Muon"),
    "warmup": muon("shorter warm-up", warmup=0.03),
    "beta2": muon("beta2 of 0.99", adam_beta2=0.99),
    "embedding_lr": muon("embeddings at 3 x the rate", optim_args="embedding_lr=3"),
    "spectral": muon("spectral scale", optim_args="muon_scale=spectral"),
    "normuon": muon("NorMuon", optim_args="normuon_beta2=0.95"),
    "cautious": muon("cautious decay", optim_args="cautious_weight_decay=true"),
    "zero_init": muon("residual projections of zeros", config_overrides="zero_init_residual=true"),
    "untied": muon("head of its own", **UNTIED),
    "stable": muon(
        "stable, then a decay over 60%",
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs="decay_fraction=0.6",
        warmup=0.1,
    ),
    "best": muon("the best together", **BEST),
    "best_untied": muon(
        "the best together, head of its own",
        **{**BEST, "optim_args": "embedding_lr=10,muon_scale=spectral"},
        **UNTIED,
    ),
    "best_wide": muon("the best together, wide init", **BEST, **WIDE),
}


@dataclass
class BenchmarkArguments:
    data_dir: str = flag("data/demo", "a data folder made by prepare_data.py")
    work_dir: str = flag("runs/optimizers", "the folder for the runs, of one model and one data folder")
    config_overrides: str = flag("n_layer=4,n_embd=128,n_head=4,n_positions=256", "the model")
    per_device_train_batch_size: int = flag(16, "rows in an optimizer step")
    steps: int = flag(400, "AdamW's optimizer steps")
    seeds: list[int] = flag([1, 2, 3], "that the best learning rate of each rung is run with", nargs="+")
    rungs: list[str] = flag(list(RUNGS), "what to compare; one of AdamW at least", nargs="+", choices=list(RUNGS))
    eval_iters: int = flag(None, "see train_accelerate.py; all validation rows if left out")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP)
    jobs: int = flag(1, "seeds that run at the same time")
    plot: str = flag("docs/optimizers.png", "the picture to write")

    def problems(self) -> list[str]:
        found = []
        if len(set(self.seeds)) < 2 or TUNING_SEED in self.seeds:
            found.append(f"--seeds needs two or more, to see how much they differ, and not {TUNING_SEED}")
        if not any(RUNGS[name].is_adamw for name in self.rungs):
            found.append("--rungs needs one of AdamW, whose loss the others have to reach")
        if self.steps < 20 or self.jobs < 1:
            found.append("--steps must be at least 20 and --jobs at least 1")
        return found


@dataclass(frozen=True)
class Result:
    """
    The result of a rung.

    Attributes:
        losses: final validation losses of all seeds, by steps.
        seconds: median time of a step.
    """

    rung: Rung
    learning_rate: float
    losses: dict[int, list[float]]
    seconds: float

    def steps_to(self, target: float, seed: int | None = None) -> float:
        """Return the steps to a loss, of one seed or of the mean of all."""
        steps = sorted(self.losses)
        curve = [self.losses[each] for each in steps]
        values = [statistics.mean(losses) if seed is None else losses[seed] for losses in curve]
        return crossing(steps, values, target)


def crossing(steps: list[int], losses: list[float], target: float) -> float:
    """Return where the loss falls to `target`, straight in the logarithm of the steps; infinite if it never does."""
    if losses[0] <= target:
        return steps[0]  # at most so many
    for index in range(1, len(steps)):
        if losses[index] <= target:
            part = (losses[index - 1] - target) / (losses[index - 1] - losses[index])
            return math.exp(math.log(steps[index - 1]) * (1 - part) + math.log(steps[index]) * part)
    return math.inf


class Ladder:
    """The runs of a benchmark, each trained once."""

    def __init__(self, args: BenchmarkArguments):
        self.args = args

    def measure(self, rung: Rung, targets: list[float] | None) -> Result:
        """
        Tune a rung, and train it with all seeds.

        Args:
            targets: losses to reach, by seed; None for a rung of AdamW.
        """
        budget = 1.0 if targets is None else TUNED_AT
        rate = self.tune(rung, self.steps_of(budget))
        losses = {self.steps_of(budget): self.final_losses(rung, rate, self.steps_of(budget))}
        if targets is not None:
            self.surround(rung, rate, losses, targets)
        seconds = statistics.median(
            line["step_seconds"]
            for seed in self.args.seeds
            for line in self.train(rung, rate, self.steps_of(budget), seed)
            if "step_seconds" in line
        )
        return Result(rung, rate, dict(sorted(losses.items())), seconds)

    def steps_of(self, budget: float) -> int:
        return round(budget * self.args.steps)

    def tune(self, rung: Rung, steps: int) -> float:
        """Return the best learning rate for the tuning seed, which has a worse one on either side."""
        losses: dict[float, float] = {}
        rates = [rung.learning_rate / STEP, rung.learning_rate, rung.learning_rate * STEP]
        while True:
            losses |= {rate: self.final_loss(rung, rate, steps, TUNING_SEED) for rate in rates}
            best = min(losses, key=lambda rate: losses[rate])
            if min(losses) < best < max(losses):
                return best
            rates = [best / STEP if best == min(losses) else best * STEP]

    def surround(self, rung: Rung, rate: float, losses: dict[int, list[float]], targets: list[float]) -> None:
        """Train with smaller and larger budgets until the target of every seed, and of their mean, lies in between."""

        def reached(steps: int) -> list[bool]:
            targets_and_mean = [*targets, statistics.mean(targets)]
            found = [*losses[steps], statistics.mean(losses[steps])]
            return [loss <= target for loss, target in zip(found, targets_and_mean, strict=True)]

        for budget in reversed([each for each in BUDGETS if each < TUNED_AT]):
            if not any(reached(min(losses))):
                break
            losses[self.steps_of(budget)] = self.final_losses(rung, rate, self.steps_of(budget))
        for budget in [each for each in BUDGETS if each > TUNED_AT]:
            if all(reached(max(losses))):
                break
            losses[self.steps_of(budget)] = self.final_losses(rung, rate, self.steps_of(budget))

    def final_losses(self, rung: Rung, rate: float, steps: int) -> list[float]:
        """Return the validation loss at the end of each seed's run."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            return list(pool.map(lambda seed: self.final_loss(rung, rate, steps, seed), self.args.seeds))

    def final_loss(self, rung: Rung, rate: float, steps: int, seed: int) -> float:
        return next(line["eval_loss"] for line in reversed(self.train(rung, rate, steps, seed)) if "eval_loss" in line)

    def train(self, rung: Rung, rate: float, steps: int, seed: int) -> list[dict]:
        """Train a complete run, unless it is there already. Returns the lines of its metrics.jsonl."""
        args, flags = self.args, {"lr_scheduler_type": "linear", **rung.flags}
        name = "-".join(
            [f"{key}={value}" for key, value in sorted(flags.items())] + [f"{rate:g}", f"{steps}", f"{seed}"]
        )
        output_dir = Path(args.work_dir) / name.replace("/", "_")
        if not (output_dir / "model.safetensors").exists():
            flags["warmup_steps"] = round(flags.pop("warmup") * steps)
            flags["config_overrides"] = ",".join(filter(None, [args.config_overrides, flags.get("config_overrides")]))
            flags |= {
                "data_dir": args.data_dir,
                "output_dir": output_dir,
                "per_device_train_batch_size": args.per_device_train_batch_size,
                "learning_rate": rate,
                "max_steps": steps,
                "seed": seed,
                "eval_steps": steps,
                "eval_iters": args.eval_iters,
                "save_steps": steps,
                "report_to": "none",
            }
            words = [word for key, value in flags.items() if value is not None for word in (f"--{key}", str(value))]
            result = subprocess.run(
                [sys.executable, str(SCRIPT), *words],
                env={"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_MIXED_PRECISION": args.mixed_precision},
                capture_output=True,
                text=True,
            )
            if "not finite" in result.stderr:
                return [{"eval_loss": math.inf}]  # this learning rate is too high
            if result.returncode:
                raise UserError(f"{output_dir.name} ended with status {result.returncode}: {result.stderr[-2000:]}")
            print(f"{output_dir.name} is finished", file=sys.stderr, flush=True)
        return read_metrics(output_dir)


def measure_all(args: BenchmarkArguments) -> tuple[list[Result], Result]:
    """Return the results of all rungs, and the one among AdamW's that ends lowest."""
    ladder, rungs = Ladder(args), [RUNGS[name] for name in args.rungs]
    results = [ladder.measure(rung, None) for rung in rungs if rung.is_adamw]
    best = min(results, key=lambda result: statistics.mean(result.losses[args.steps]))
    targets = best.losses[args.steps]
    return results + [ladder.measure(rung, targets) for rung in rungs if not rung.is_adamw], best


def row(result: Result, best_adamw: Result, steps: int) -> list[str]:
    """Return a line of the table."""
    targets = best_adamw.losses[steps]
    budget = steps if result.rung.is_adamw else round(TUNED_AT * steps)
    losses = result.losses[budget]
    loss = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
    cells = [result.rung.title, f"{result.learning_rate:g}"]
    if result.rung.is_adamw:
        return [*cells, loss, "", "", f"{result.seconds / best_adamw.seconds:.2f}"]
    ratios = [result.steps_to(target, seed) / steps for seed, target in enumerate(targets)]
    ratio = result.steps_to(statistics.mean(targets)) / steps
    below = "< " if ratio * steps <= min(result.losses) else ""
    return [
        *cells,
        "",
        loss,
        f"{below}{ratio:.3f} ({', '.join(f'{each:.3f}' for each in ratios)})",
        f"{result.seconds / best_adamw.seconds:.2f}",
    ]


def draw(path: Path, results: list[Result], best_adamw: Result, steps: int, tokens_per_step: int) -> None:
    """Draw the final losses of all seeds over the tokens, for each rung."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    target = statistics.mean(best_adamw.losses[steps])
    axes.axhline(target, color="tab:gray", linestyle="--", label=f"{best_adamw.rung.title}, all tokens: {target:.3f}")
    for index, result in enumerate(each for each in results if not each.rung.is_adamw):
        tokens = [each * tokens_per_step for each in result.losses]
        means = [statistics.mean(losses) for losses in result.losses.values()]
        style = ("-", "--", "-.", ":")[index // 10 % 4]
        axes.plot(tokens, means, style, marker="o", markersize=4, linewidth=1.2, label=result.rung.title)
    axes.set_xlabel("tokens of a whole run")
    axes.set_ylabel("validation loss at its end (nats per token), mean of the seeds")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def check_work_dir(args: BenchmarkArguments) -> None:
    """
    Raises:
        UserError: if the folder has runs of another model or other data, which their names do not tell.
    """
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
    results, best_adamw = measure_all(args)
    lines = Ladder(args).train(best_adamw.rung, best_adamw.learning_rate, args.steps, args.seeds[0])
    tokens_per_step = lines[-1]["tokens"] // args.steps
    draw(Path(args.plot), results, best_adamw, args.steps, tokens_per_step)
    header = ["recipe", "peak learning rate", "loss, all tokens", f"loss, {TUNED_AT:.0%}", "tokens to AdamW's loss"]
    print(
        side_by_side.section(
            ("torch", "transformers", "accelerate"),
            f"{args.config_overrides}, {args.steps} steps of {tokens_per_step:,} tokens, "
            f"{side_by_side.precision_name(args.mixed_precision)}; mean and standard deviation over "
            f"{len(args.seeds)} seeds; tokens as a part of those of {best_adamw.rung.title}, of the mean and by seed",
            table([*header, "time of a step"], (row(result, best_adamw, args.steps) for result in results)),
        )
    )


if __name__ == "__main__":
    run_script(main)
