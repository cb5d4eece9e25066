"""The final model of a run, and the run on the Hub: its repository, its checkpoints, and its model at the end."""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator, PartialState
from torch import nn

from pretraining.checkpoints.checkpoint import full_weights
from pretraining.checkpoints.folders import BEST, HUB, best_checkpoint, step_of
from pretraining.checkpoints.state import Position
from pretraining.data.training_data import TrainingData
from pretraining.distributed.processes import on_main_process
from pretraining.errors import UserError, one_line
from pretraining.files import INCOMPLETE
from pretraining.hub import LICENSE, HubRefusal, create_repository
from pretraining.publishing.export import export
from pretraining.publishing.model_card import title_of
from pretraining.publishing.push import published, push
from pretraining.records.metrics import read_metrics
from pretraining.records.run_files import PLOTS, WEIGHTS
from pretraining.training.flags import TrainArguments


def open_repository(args: TrainArguments, state: PartialState) -> str:
    """
    The whole name of the repository on the Hub, which is made now: that a token may not write is better told before
    training than after it. A Hub that cannot be reached may be by then.

    Raises:
        HubRefusal: on all processes, if the Hub refuses it.
    """

    def work() -> str:
        name = args.hub_model_id or title_of(args.output_dir)
        try:
            return create_repository(name, args.hub_private_repo, args.license or LICENSE)
        except HubRefusal:
            raise
        except UserError as error:
            print(f"warning: {error}; it is tried again when there is something to publish", file=sys.stderr)
            return name

    return on_main_process(state, work)


def write_final_model(
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    write_card: Callable[[Path], None],
    output_dir: Path,
) -> None:
    """Write the final model and its card, and print how good it is."""
    state_dict = full_weights(accelerator, model)  # on all processes: each may hold a part
    if not accelerator.is_main_process:
        return
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    export(unwrapped, data.tokenizer, write_card, output_dir, state_dict)
    evaluation = [line for line in read_metrics(output_dir) if "eval_loss" in line][-1]
    yardsticks = "".join(f", {name} {rate:.3f}" for name, rate in data.validation.compression_rates.items())
    bits_per_byte = evaluation["eval_bits_per_byte"]
    print(f"{output_dir}: {bits_per_byte:.3f} bits per byte of the validation text{yardsticks}")
    best = best_checkpoint(output_dir)
    if best and best[1] < evaluation["eval_loss"]:
        print(f"{best[0]} ({BEST}) has a lower eval_loss than the final model: {best[1]:.4f}")


def publish_run(args: TrainArguments, repo_id: str) -> None:
    """
    Publish the model of a run that is finished.

    Raises:
        UserError: see `push`.
    """
    address = push(
        Path(args.output_dir),
        repo_id,
        args.hub_private_repo,
        "Trained by gpt2scratch",
        args.license,
        args.stock_branch,
    )
    print(f"published as {address}")


def try_to_publish_run(args: TrainArguments, repo_id: str) -> None:
    """
    The same at the end of training, where a Hub that is out of reach is no failure of the run.

    Raises:
        HubRefusal: if the Hub refuses it.
    """
    try:
        publish_run(args, repo_id)
    except HubRefusal:
        raise
    except UserError as error:
        print(f"warning: {error}; the same command, when it can be reached, publishes the run", file=sys.stderr)


class CheckpointPublisher:
    """
    Publishes checkpoints while training goes on. One at a time: a checkpoint that is saved while another one is on its
    way is passed over, as the next one will bring what is newer. What fails is told, and tried again by the next one.

    Args:
        write_card: writes the card of a checkpoint into a copy of it, given its position.
        say: tells the person a line.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str,
        private: bool,
        write_card: Callable[[Path, Position], None],
        say: Callable[[str], None],
    ):
        self.output_dir = output_dir
        self.repo_id = repo_id
        self.private = private
        self.write_card = write_card
        self.say = say
        self._thread: threading.Thread | None = None

    def __call__(self, checkpoint: Path, position: Position) -> None:
        """Begin to publish a checkpoint that was just written; other threads may delete it from then on."""
        if self._thread is not None and self._thread.is_alive():
            return
        staged = self.output_dir / (HUB + INCOMPLETE)
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            for path in published(checkpoint):
                _keep(path, staged / path.name)
            self.write_card(staged, position)
            (staged / PLOTS).mkdir()
            for path in (self.output_dir / PLOTS).glob("*.png"):
                shutil.copyfile(path, staged / PLOTS / path.name)
        except Exception as error:  # whatever it is, the checkpoint is there, and training goes on
            self.say(f"warning: {checkpoint} is not published: {one_line(error)}")
            return
        # A daemon: a run that is stopped does not wait for the Hub, where the commit is made as a whole or not at all.
        self._thread = threading.Thread(target=self._push, args=(staged, step_of(checkpoint)), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what is on its way is there: what is pushed next has to come after it."""
        if self._thread is not None:
            self._thread.join()

    def _push(self, staged: Path, step: int) -> None:
        try:
            address = push(staged, self.repo_id, self.private, f"Step {step:,}")
            self.say(f"step {step} is published as {address}")
        except Exception as error:
            self.say(f"warning: {one_line(error)}; step {step} is not published, training goes on")
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _keep(source: Path, target: Path) -> None:
    """A file that is there when `source` is deleted: of the weights without a copy, if the file system can."""
    if source.name == WEIGHTS:  # of others some are written anew, in place
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
