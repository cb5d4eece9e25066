"""
What a run leaves to look at: metrics.jsonl, events.jsonl, the progress bar and the trackers. Plots are in plots.py.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from tqdm import tqdm

from pretraining.errors import one_line
from pretraining.records.metrics import CLOCK, append_line, finite, truncate
from pretraining.records.progress import Progress
from pretraining.records.run_files import EVENTS, METRICS

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
        is_due: the evaluations of `first_step` will be done again: their lines are removed too.
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
        is_due: bool = False,
    ):
        self.is_main = accelerator.is_main_process
        self.output_dir = output_dir
        self.trackers: dict[str, GeneralTracker] = {}
        self.lost: dict[str, int] = {}  # by tracker that failed, the last step that it got
        if self.is_main:
            for name in (METRICS, EVENTS):
                truncate(output_dir / name, first_step, is_due)
            # They take numbers, words and booleans, not lists or None.
            settings = {
                key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()
            }
            for name in report_to:
                if not self.attempt(name, partial(self._open, name, first_step, settings)):
                    self.lost[name] = first_step
        bar_is_here = accelerator.is_local_main_process
        self.bar = tqdm(total=max_steps, initial=first_step, desc="training", unit="step", disable=not bar_is_here)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, tracker.finish)
        for name, step in self.lost.items():
            what = f"after step {step}" if step else "of this run"
            print(f"{name} has nothing {what}; {self.output_dir / METRICS} has everything", file=sys.stderr)

    def metrics(self, progress: Progress, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and send it to the trackers."""
        if not self.is_main:
            return
        clock = dict(zip(CLOCK, (progress.step, progress.tokens, round(progress.elapsed_seconds, 3)), strict=True))
        append_line(self.output_dir / METRICS, clock | {key: finite(value) for key, value in values.items()})
        for name, tracker in list(self.trackers.items()):
            if not self.attempt(name, partial(tracker.log, values, step=progress.step)):
                self.lost[name] = progress.step - 1

    def event(self, event: dict) -> None:
        """Append a line to events.jsonl."""
        if self.is_main:
            append_line(self.output_dir / EVENTS, event)

    def show_progress(self, step: int, **postfix: str) -> None:
        self.bar.update(step - self.bar.n)
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)

    def write(self, text: str) -> None:
        """A line of text above the progress bar."""
        if self.is_main:
            self.bar.write(text)

    def _open(self, name: str, first_step: int, settings: dict) -> None:
        tracker = TRACKERS[name](self.output_dir, first_step)
        tracker.start()
        tracker.store_init_configuration(settings)
        self.trackers[name] = tracker

    def attempt(self, name: str, action: Callable[[], object]) -> bool:
        """
        Whether `action` came to its end. A tracker or plot that fails, for no network, say, is done without:
        metrics.jsonl has all that they show.
        """
        try:
            action()
        except Exception as error:
            self.trackers.pop(name, None)
            tqdm.write(f"warning: {name} failed, the run goes on without it: {one_line(error)}", file=sys.stderr)
            return False
        return True
