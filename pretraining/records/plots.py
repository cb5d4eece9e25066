"""The plots of a run, drawn from its metrics.jsonl."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pretraining.files import INCOMPLETE
from pretraining.records.metrics import is_of_hellaswag, read_metrics
from pretraining.records.reference_losses import LossCurve
from pretraining.records.run_files import HELLASWAG_PLOT, LOSS_PLOT, TASKS_PLOT
from pretraining.records.task_results import TaskSource, task_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACIES = ("acc", "acc_norm", "exact_match", "f1", "mcc")  # of tasks, as fractions
SETTLED = 0.05  # part of the tokens seen after which a loss has to be in the picture
LABEL_HEIGHT = 0.04  # of a reference line's name, as a part of the plot's height


def plot_loss(output_dir: Path, reference_losses: dict[str, float], curve: LossCurve | None = None) -> None:
    """
    Draw plots/loss.png: training and validation loss over the tokens seen.

    Args:
        reference_losses: what to compare the validation loss with, in nats per token, such as `{"gzip -9": 4.31}`.
        curve: a published validation loss over the same tokens, to draw behind.
    """
    lines = read_metrics(output_dir)
    figure, axes = _new_figure()
    training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["tokens"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    published = curve.points((training + evaluation)[-1][0]) if curve else []
    if curve and len(published) > 1:
        axes.plot(*zip(*published, strict=True), color="tab:green", linestyle="--", linewidth=1.2, label=curve.name)
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set_ylabel("loss (nats per token)")
    # The fall of the first steps would take most of the plot, and what comes after it is worth looking at.
    points = training + evaluation
    settled = [loss for tokens, loss in points if tokens >= SETTLED * points[-1][0]]
    highest = max(settled)
    references = {name: loss for name, loss in reference_losses.items() if loss < highest}
    margin = 0.03 * (highest - min(settled)) + 0.02
    axes.set_ylim(min([*settled, *references.values()]) - margin, highest + margin)
    _reference_lines(axes, references)
    _finish(axes)
    _save(figure, output_dir / LOSS_PLOT)


def plot_hellaswag(output_dir: Path) -> None:
    """Draw plots/hellaswag.png: accuracy over the tokens seen, beside what OpenAI's models reach."""
    lines = [line for line in read_metrics(output_dir) if is_of_hellaswag(line)]
    tokens = [line["tokens"] for line in lines]
    figure, axes = _new_figure()
    for key, color, label in (("acc_norm", "tab:orange", "acc_norm"), ("acc", "tab:blue", "acc")):
        values = [100 * line[f"hellaswag_{key}"] for line in lines]
        axes.plot(tokens, values, color=color, marker="o", markersize=4, label=label)
    _reference_lines(axes, {"chance": 25.0} | HELLASWAG_ACC_NORM)
    axes.set_ylabel(f"HellaSwag, % of {lines[-1]['hellaswag_n']:,} items")
    _finish(axes)
    _save(figure, output_dir / HELLASWAG_PLOT)


def plot_tasks(output_dir: Path, sources: list[TaskSource]) -> None:
    """
    Draw plots/tasks.png: accuracies over the tokens seen, by length where a task has that, and below them perplexities
    and the like.
    """
    from matplotlib.figure import Figure

    lines = [line for line in read_metrics(output_dir) if "eval_tasks_n" in line]
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        for each in task_results(sources, line):
            curves.setdefault((each.source.task, each.metric), []).append((line["tokens"], each.value))
    accuracies = {pair for pair in curves if pair[1] in ACCURACIES}
    accuracies -= {(task, "acc") for task, metric in curves if metric == "acc_norm"}
    others = {(task, metric) for task, metric in curves if metric not in ACCURACIES}
    parts = [(pairs, label) for pairs, label in ((accuracies, "%"), (others, "other metrics")) if pairs]
    figure = Figure(figsize=(8, 5 * max(1, len(parts))), layout="constrained")
    for index, (pairs, label) in enumerate(parts):
        axes = figure.add_subplot(len(parts), 1, index + 1)
        for task, metric in sorted(pairs):
            scale = 100 if label == "%" else 1
            points = [(tokens, scale * value) for tokens, value in curves[task, metric]]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{task}, {metric}")
        if label != "%" and all(value > 0 for pair in pairs for _, value in curves[pair]):
            axes.set_yscale("log")
        axes.set_ylabel(label)
        _finish(axes)
    if parts:
        _save(figure, output_dir / TASKS_PLOT)


def _new_figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # without pyplot, which would keep it

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _reference_lines(axes: "Axes", values: dict[str, float]) -> None:
    """Dashed lines, each with its name on the right, where names of close lines make room for each other."""
    for value in values.values():
        axes.axhline(value, color="tab:gray", linestyle="--", linewidth=0.8)
    bottom, top = axes.get_ylim()
    height = -math.inf  # as a part of the plot's
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        height = max((value - bottom) / (top - bottom), height + LABEL_HEIGHT)
        axes.text(1.01, height, f"{name} {value:.2f}", transform=axes.transAxes, va="center", fontsize=8, color="0.3")


def _finish(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(EngFormatter())  # 500k, 1M, 1.5M
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + INCOMPLETE)
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)


# acc_norm of the completion protocol, in percent of all 10,042 items.
HELLASWAG_ACC_NORM = {
    "GPT-2 124M": 29.55,  # build-nanogpt, hellaswag.py
    "GPT-2 350M": 37.52,  # llm.c, dev/vislog.ipynb
    "GPT-2 774M": 43.20,  # llm.c, dev/vislog.ipynb
    "GPT-2 1558M": 48.93,  # build-nanogpt, hellaswag.py
    "GPT-3 124M": 33.70,  # this and the others: llm.c, dev/vislog.ipynb, after Brown et al. 2020
    "GPT-3 350M": 43.60,
    "GPT-3 760M": 51.00,
    "GPT-3 1.3B": 54.70,
}
