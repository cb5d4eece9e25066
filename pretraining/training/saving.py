"""Where a run stands, and the checkpoints that it saves."""

from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from pretraining.checkpoints.checkpoint import CheckpointWriter
from pretraining.checkpoints.folders import checkpoint_folder
from pretraining.checkpoints.state import Position
from pretraining.data.training_data import Batches
from pretraining.distributed.processes import on_main_process
from pretraining.hardware import generator_states
from pretraining.records.progress import Progress
from pretraining.records.run_log import RunLog
from pretraining.training.bad_steps import BadSteps
from pretraining.training.setup import Setup


@dataclass
class Saver:
    """
    Saves checkpoints of a run, also from before steps that went wrong. All processes have to call its methods
    together.

    Attributes:
        batches: micro-batches of this process.
        last_good: where this process stood before the steps in a row that were not finite.
    """

    setup: Setup
    progress: Progress
    batches: Batches
    bad_steps: BadSteps
    writer: CheckpointWriter
    log: RunLog

    def __post_init__(self) -> None:
        self.last_good = self.position()

    def position(self, evaluation_pending: bool = False) -> Position:
        """Return where this process stands, between two steps."""
        return Position(
            step=self.progress.step,
            elapsed_seconds=self.progress.elapsed_seconds,
            is_due=evaluation_pending,
            identity=self.setup.identity,
            anomalies=self.bad_steps.state(),
            streams=[self.batches.position()],
            generators=generator_states(self.setup.accelerator.device),
        )

    def save(self, position: Position) -> Path:
        """Begin to save a checkpoint with the weights as they are. Returns the folder that it will have."""
        self.writer.save(position)
        self.progress.restart_interval()
        return checkpoint_folder(self.setup.output_dir, position.step)

    def save_last_good(self) -> Path | None:
        """Save the position from before the bad steps, unless it is saved already. Returns None if it is step 0."""
        self.writer.wait()  # for what may be that very checkpoint
        step = self.last_good.step
        folder = checkpoint_folder(self.setup.output_dir, step)
        if step and not on_main_process(self.setup.accelerator.state, folder.exists):
            self.save(self.last_good)
        return folder if step else None

    def stop(self, stop_signals: list[int]) -> None:
        """Save a checkpoint, as a process received a signal."""
        is_amid_bad_steps = self.bad_steps.not_finite_in_a_row > 0
        folder = self.save_last_good() if is_amid_bad_steps else self.save(self.position(evaluation_pending=True))
        self.writer.wait()
        process, number = next((process, number) for process, number in enumerate(stop_signals) if number)
        of = f" of process {process}" if len(stop_signals) > 1 else ""
        saved = f"{folder} is saved, the same command goes on from it" if folder else "there is nothing to save"
        self.log.write(f"stopped by {Signals(number).name}{of}: {saved}")
