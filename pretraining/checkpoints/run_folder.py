"""The folder of a run, opened for one program at a time: to begin, or to go on where another one ended."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import Accelerator, PartialState
from torch import nn
from torch.optim import Optimizer

from pretraining.checkpoints.checkpoint import load_checkpoint
from pretraining.checkpoints.folders import checkpoint_to_resume, checkpoints, remove_litter, set_aside_later
from pretraining.checkpoints.identity import differences
from pretraining.checkpoints.state import Position
from pretraining.distributed.processes import on_main_process
from pretraining.errors import UserError
from pretraining.files import INCOMPLETE, locked, write_text
from pretraining.optimization.schedule import SCHEDULE_SETTINGS, is_same_schedule
from pretraining.records.run_files import EVENTS, IDENTITY, METRICS, TRAINING_ARGS, WEIGHTS

AT_FIRST = {".lock", TRAINING_ARGS, IDENTITY}  # in the folder of a run that has not begun


@dataclass(frozen=True)
class ResumePlan:
    """
    Attributes:
        is_finished: the run there has come to its end.
        checkpoint: to go on from, None to start at the beginning.
        messages: what was found, and is passed over.
    """

    is_finished: bool = False
    checkpoint: Path | None = None
    messages: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_run_folder(
    output_dir: Path, arguments: dict, identity: dict, defaults: dict, state: PartialState
) -> Iterator[ResumePlan]:
    """
    Make the run folder, or check that the run there is the one to go on with. A new run's training_args.yaml is
    written here, that of one that goes on by `write_arguments`, when its checkpoint has been loaded. A new folder is
    deleted again if its run turns out to be impossible before it has left anything there.

    Args:
        arguments: every flag.
        identity: see `identity.identity`.
        defaults: the settings of a run without flags.

    Raises:
        UserError: on all processes, if the folder holds something else, is in use, or has a run that differs.
    """
    is_new = False
    with contextlib.ExitStack() as stack:

        def work() -> ResumePlan:
            nonlocal is_new
            _check_kind(output_dir)
            try:
                output_dir.mkdir(parents=True)
                is_new = True
            except FileExistsError:
                pass
            except OSError as error:
                raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from None
            stack.enter_context(
                locked(output_dir, f"--output_dir {output_dir} is in use by another program: wait for it, or stop it")
            )
            try:
                return _open(output_dir, arguments, identity, defaults)
            except OSError as error:
                raise UserError(f"--output_dir {output_dir} cannot be used: {error}") from None

        try:
            yield on_main_process(state, work)
        except UserError:
            if is_new and {path.name for path in output_dir.iterdir()} <= AT_FIRST:
                shutil.rmtree(output_dir, ignore_errors=True)
            raise


def is_finished(output_dir: Path) -> bool:
    return (output_dir / WEIGHTS).is_file()


def write_arguments(output_dir: Path, arguments: dict, identity: dict) -> None:
    """Write training_args.yaml, a recipe of the run, and identity.json, what it may be compared with."""
    given = {key: value for key, value in arguments.items() if value is not None}
    write_text(output_dir / TRAINING_ARGS, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    write_text(output_dir / IDENTITY, json.dumps(identity, indent=2) + "\n")


def _check_kind(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is not a folder")
    names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if names - {".lock", TRAINING_ARGS + INCOMPLETE} and TRAINING_ARGS not in names:  # the first two of a new run
        raise UserError(f"--output_dir {output_dir} exists and is not a run folder: choose another")


def _open(output_dir: Path, arguments: dict, identity: dict, defaults: dict) -> ResumePlan:
    resume, has_run = arguments["resume_from_checkpoint"], bool(checkpoints(output_dir))
    finished = is_finished(output_dir)
    if resume == "none" and (has_run or finished):
        raise UserError(
            f"--output_dir {output_dir} holds a run already: delete it, or choose another, to start from step 0"
        )
    if finished:
        _check_finished(output_dir, identity, defaults)
        return ResumePlan(is_finished=True)
    if has_run and resume != "auto" and not Path(resume).resolve().is_relative_to(output_dir.resolve()):
        if _read_arguments(output_dir).get("resume_from_checkpoint") != resume:
            raise UserError(
                f"--output_dir {output_dir} holds a run already, which --resume_from_checkpoint {resume} is not of: "
                "choose another --output_dir, or go on with that run by --resume_from_checkpoint auto"
            )
        resume = "auto"  # the run there began so, and has come further
    messages = [f"{path} was never finished, and is deleted" for path in remove_litter(output_dir)]
    folder, damages = checkpoint_to_resume(output_dir, resume)
    if folder is None:
        write_arguments(output_dir, arguments, identity)
        return ResumePlan(messages=messages)
    messages += [f"passed over: {damage}" for damage in damages]
    is_branch = folder.resolve().parent != output_dir.resolve()
    _check_position(folder, arguments["allow_changes"], identity, defaults, is_branch)
    return ResumePlan(checkpoint=folder, messages=messages)


def _read_arguments(output_dir: Path) -> dict:
    path = output_dir / TRAINING_ARGS
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path} is damaged: without it nobody knows what run this is") from None


def _check_finished(output_dir: Path, identity: dict, defaults: dict) -> None:
    try:
        before = dict(json.loads((output_dir / IDENTITY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return  # a model that came from elsewhere: it is left as it is
    # Its precision may be another, as nothing is trained.
    if problems := differences(before, identity, ["mixed_precision"], defaults, is_finished=True):
        further = f"to train its model further: --model_name_or_path {output_dir} and another --output_dir"
        raise UserError(*(f"{output_dir} holds a finished run, of {problem} ({further})" for problem in problems))


def _check_position(
    folder: Path, allow_changes: list[str], identity: dict, defaults: dict, is_branch: bool = False
) -> None:
    position = Position.read(folder)
    max_steps = identity["settings"]["max_steps"]
    if position.step >= max_steps:
        raise UserError(f"{folder} has --max_steps {max_steps} behind it: nothing is left to train")
    settings = position.identity.get("settings")  # read from a file that may hold anything
    before = defaults | (settings if isinstance(settings, dict) else {})
    if is_branch and is_same_schedule(before, identity["settings"], position.step):
        # A cool-down of its own, say: the steps up to the checkpoint would have been the same.
        allow_changes = [*allow_changes, *SCHEDULE_SETTINGS]
    if problems := differences(position.identity, identity, allow_changes, defaults):
        raise UserError(*(f"{folder} is of {problem}" for problem in problems))


def resume(
    checkpoint: Path,
    output_dir: Path,
    arguments: dict,
    identity: dict,
    model: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
) -> Position:
    """
    Restore model, optimizer and random generators from a checkpoint, and make the run folder one that continues there.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.

    Returns:
        The position of this process.
    """
    position = load_checkpoint(accelerator, checkpoint, model, optimizer)
    accelerator.print(f"continuing from {checkpoint}")
    if accelerator.is_main_process:
        write_arguments(output_dir, arguments, identity)
        for name in (METRICS, EVENTS):  # of a branch: what its plots and its card tell of the steps before it
            earlier = checkpoint.resolve().parent / name
            if earlier.is_file() and not (output_dir / name).exists():
                write_text(output_dir / name, earlier.read_text(encoding="utf-8"))
        for folder in set_aside_later(output_dir, position.step):
            print(f"set aside, as this run goes on from an earlier step: {folder}")
    return position
