"""What a run leaves to look at: metrics.jsonl, the progress bar, the trackers and the plots."""

import json
import math
import os
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from pretraining.files import INCOMPLETE, write_text
from pretraining.run import Run

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """
    Writes on the main process, and does nothing on the others.

    Args:
        first_step: the number of steps already done; lines of metrics.jsonl beyond it belong to a continuation that
            was lost, and are removed.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int, max_steps: int):
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.path = output_dir / METRICS_FILE
        if self.is_main:
            _truncate(self.path, first_step)
        self.bar = tqdm(
            total=max_steps, initial=first_step, desc="training", unit="step", disable=not self.is_main, leave=True
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def metrics(self, run: Run, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and send it to the tracker."""
        if self.is_main:
            clock = {"step": run.step, "tokens": run.tokens, "elapsed_seconds": round(run.elapsed_seconds, 3)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clock | values) + "\n")
        self.accelerator.log(values, step=run.step)

    def progress(self, step: int, **postfix: str) -> None:
        self.bar.update(step - self.bar.n)
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)

    def write(self, text: str) -> None:
        """A line of text above the progress bar."""
        if self.is_main:
            self.bar.write(text)


def read_metrics(output_dir: Path) -> list[dict]:
    path = output_dir / METRICS_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def plot_loss(output_dir: Path, bits_per_byte_lines: dict[str, float], bytes_per_token: float) -> Path:
    """
    Draw plots/loss.png: training and validation loss over the tokens seen.

    Args:
        bits_per_byte_lines: compression rates to compare with, such as `{"gzip -9": 2.06}`, drawn where the
            validation loss would have that many bits per byte.
        bytes_per_token: of the validation text.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(output_dir)
    training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["tokens"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    for (name, rate), style in zip(bits_per_byte_lines.items(), ("--", ":"), strict=False):
        loss = rate * math.log(2) * bytes_per_token
        axes.axhline(loss, color="tab:gray", linestyle=style, label=f"{name}: {rate:.2f} bits per byte")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())  # 500k, 1M, 1.5M
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path = output_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + INCOMPLETE)
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _truncate(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and a last line that a killed run left unfinished."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_text(path, "".join(kept))
