"""A run: its folder, its step and its clock, and what it needs to know to go on from a checkpoint."""

import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer

from pretraining import checkpoint, publish
from pretraining.arguments import UserError
from pretraining.files import write_text

TRAINING_ARGS = "training_args.yaml"


@dataclass
class Run:
    """
    Where a run stands.

    Attributes:
        tokens_per_step: of all processes together.
        max_steps, optim: the flags.
        num_parameters: of the model.
        data_name, data_fingerprint, data_binding: see `sources.TrainingData`.
        step: optimizer steps done.
        elapsed_before: seconds that earlier starts of the program took.
        flops_per_token: see `hardware.flops_per_token`.
        peak_flops: of all devices together, or None if it is not known.
        evaluated: the last step with an evaluation, and its loss.
    """

    tokens_per_step: int
    max_steps: int
    optim: str
    num_parameters: int
    data_name: str
    data_fingerprint: str
    data_binding: dict[str, int]
    flops_per_token: int
    peak_flops: float | None
    step: int = 0
    elapsed_before: float = 0.0
    evaluated: tuple[int, float | None] = (-1, None)

    def __post_init__(self):
        self._started = time.perf_counter()
        self.restart_interval()

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def elapsed_seconds(self) -> float:
        return self.elapsed_before + time.perf_counter() - self._started

    def restart_interval(self) -> None:
        """Time steps from here on: evaluations, samples and checkpoints are not training speed."""
        self._interval_started, self._interval_step = time.perf_counter(), self.step

    def speed(self) -> dict[str, float]:
        """
        Since the last call or `restart_interval`: tokens per second, seconds per step, and the model FLOPs
        utilisation, `tokens_per_second * flops_per_token / peak_flops`, where the device's peak is known.
        """
        step_seconds = (time.perf_counter() - self._interval_started) / (self.step - self._interval_step)
        tokens_per_second = self.tokens_per_step / step_seconds
        self.restart_interval()
        speed = {"tokens_per_second": round(tokens_per_second, 1), "step_seconds": round(step_seconds, 5)}
        if self.peak_flops:
            speed["mfu"] = round(tokens_per_second * self.flops_per_token / self.peak_flops, 4)
        return speed

    def position(self) -> dict:
        """What a checkpoint saves of the loop. Packed rows come in an order that is a pure function of the step."""
        step, eval_loss = self.evaluated
        return {
            "step": self.step,
            "eval_loss": eval_loss if step == self.step else None,
            "tokens_per_step": self.tokens_per_step,
            "optim": self.optim,
            "num_parameters": self.num_parameters,
            "data_name": self.data_name,
            "data_fingerprint": self.data_fingerprint,
            "data_binding": self.data_binding,
            "elapsed_seconds": self.elapsed_seconds,
        }

    def resume(
        self, accelerator: Accelerator, folder: Path, model: nn.Module, optimizers: list[Optimizer]
    ) -> dict | None:
        """
        Go on from a checkpoint. Returns where this process's stream was, if the data is one.

        Raises:
            UserError: if it is damaged, or was made with other data or another global batch.
        """
        position = checkpoint.load_checkpoint(accelerator, folder, model, optimizers, self._refuse)
        self.step, self.elapsed_before = position["step"], position["elapsed_seconds"]
        return position["stream"]

    def _refuse(self, position: dict) -> list[str]:
        name, tokens = f"the checkpoint of step {position['step']}", position["tokens_per_step"]
        problems = []
        if position["step"] >= self.max_steps:
            problems.append(f"{name} has --max_steps {self.max_steps} behind it: nothing is left to train")
        for key, what in (("optim", "--optim {}"), ("num_parameters", "a model of {:,} parameters")):
            if position[key] != getattr(self, key):
                problems.append(f"{name} is of {what.format(position[key])}, not {what.format(getattr(self, key))}")
        if position["data_fingerprint"] != self.data_fingerprint:
            before, now = position.get("data_name", "other data"), self.data_name
            problems.append(f"{name} was trained on other data: on {before}, now it would be {now}")
        for key, value in position.get("data_binding", {}).items():
            if self.data_binding.get(key, value) != value:
                now = self.data_binding[key]
                problems.append(f"{name} is of a stream with {key} {value}, now it would be {now}: it has to stay")
        if tokens != self.tokens_per_step:
            problems.append(
                f"{name} was trained with {tokens} tokens per step, now it would be {self.tokens_per_step}: "
                f"--tokens_per_step {tokens} keeps it"
            )
        return problems


def open_run_folder(
    output_dir: Path, arguments: dict, settings: dict, state: PartialState, goes_on: bool = False
) -> bool:
    """
    Make the run folder and write its training_args.yaml, or check that the run there is the one to go on with.

    Args:
        arguments: every flag.
        settings: those that decide the result; they have to be the same for a run that goes on.
        goes_on: from a checkpoint, which may still refuse it: training_args.yaml is then left to `write_arguments`.

    Returns:
        Whether the run there is finished already.

    Raises:
        UserError: if the folder holds something else, or a run with other settings.
    """
    verdict: list = [None, None]
    if state.is_main_process:
        verdict = [_problems(output_dir, arguments, settings), publish.is_finished(output_dir)]
        if not any(verdict) and not goes_on:
            try:
                write_arguments(output_dir, arguments)
            except OSError as error:
                verdict[0] = [f"--output_dir {output_dir} cannot be written: {error.strerror}"]
    problems, finished = broadcast_object_list(verdict)
    if problems:
        raise UserError(*problems)
    return finished


def write_arguments(output_dir: Path, arguments: dict) -> None:
    """Write training_args.yaml, a recipe of the run."""
    given = {key: value for key, value in arguments.items() if value is not None}
    write_text(output_dir / TRAINING_ARGS, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def _problems(output_dir: Path, arguments: dict, settings: dict) -> list[str]:
    if output_dir.exists() and not output_dir.is_dir():
        return [f"--output_dir {output_dir} is not a folder"]
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return []
    if not (output_dir / TRAINING_ARGS).is_file():
        return [f"--output_dir {output_dir} exists and is not a run folder: choose another"]
    if not checkpoint.complete_checkpoints(output_dir) and not publish.is_finished(output_dir):
        return []  # it ended before there was anything to lose
    if arguments["resume_from_checkpoint"] == "none":
        return [f"--output_dir {output_dir} holds a run already: delete it, or choose another, to start from step 0"]
    try:
        before = dict(yaml.safe_load((output_dir / TRAINING_ARGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError):
        return [f"{output_dir / TRAINING_ARGS} is damaged: without it nobody knows what run this is"]
    return [
        f"{output_dir} holds a run with --{key} {before.get(key)}, not {value}: choose another --output_dir"
        for key, value in settings.items()
        if before.get(key) != value
    ]
