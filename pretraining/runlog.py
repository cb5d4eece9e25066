"""What a run leaves to look at: metrics.jsonl, the progress bar and the trackers. The plots are in plots.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from tqdm import tqdm

from pretraining.arguments import one_line
from pretraining.files import write_text
from pretraining.run import Run

METRICS_FILE = "metrics.jsonl"
PROJECT = "gpt2scratch"
# What a run that was cut short had sent after its checkpoint, tensorboard drops; the others keep both.
TRACKERS: dict[str, Callable[[Path, int], GeneralTracker]] = {
    "tensorboard": lambda folder, step: TensorBoardTracker("tensorboard", folder, purge_step=step + 1),
    "wandb": lambda folder, step: WandBTracker(PROJECT, name=folder.name, dir=str(folder)),
    "trackio": lambda folder, step: TrackioTracker(PROJECT, name=folder.name),
}


class RunLog:
    """
    Writes on the main process; the progress bar is on every machine's first one.

    Args:
        first_step: the number of steps already done; lines of metrics.jsonl beyond it belong to a continuation that
            was lost, and are removed.
        report_to: names of `TRACKERS`.
        settings: what the trackers are to know of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        first_step: int,
        max_steps: int,
        report_to: list[str],
        settings: dict,
    ):
        self.is_main = accelerator.is_main_process
        self.path = output_dir / METRICS_FILE
        self.trackers: dict[str, GeneralTracker] = {}
        if self.is_main:
            _truncate(self.path, first_step)
            # They take numbers, words and booleans, not lists or None.
            settings = {
                key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()
            }
            for name in report_to:
                self.attempt(name, lambda name=name: self._open(name, output_dir, first_step, settings))
        bar_is_here = accelerator.is_local_main_process
        self.bar = tqdm(total=max_steps, initial=first_step, desc="training", unit="step", disable=not bar_is_here)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, tracker.finish)

    def metrics(self, run: Run, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and send it to the trackers."""
        if not self.is_main:
            return
        clock = {"step": run.step, "tokens": run.tokens, "elapsed_seconds": round(run.elapsed_seconds, 3)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clock | values) + "\n")
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, lambda tracker=tracker: tracker.log(values, step=run.step))

    def progress(self, step: int, **postfix: str) -> None:
        self.bar.update(step - self.bar.n)
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)

    def write(self, text: str) -> None:
        """A line of text above the progress bar."""
        if self.is_main:
            self.bar.write(text)

    def _open(self, name: str, output_dir: Path, first_step: int, settings: dict) -> None:
        tracker = TRACKERS[name](output_dir, first_step)
        tracker.start()
        self.trackers[name] = tracker
        tracker.store_init_configuration(settings)

    def attempt(self, name: str, action: Callable[[], object]) -> None:
        """A tracker or plot that fails, for no network, say, is done without: metrics.jsonl has all that they show."""
        try:
            action()
        except Exception as error:
            self.trackers.pop(name, None)
            tqdm.write(f"warning: {name} failed, the run goes on without it: {one_line(error)}", file=sys.stderr)


def read_metrics(output_dir: Path) -> list[dict]:
    path = output_dir / METRICS_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
