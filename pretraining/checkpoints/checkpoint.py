"""
What a checkpoint holds, from all processes into its folder and back.

checkpoint-000500/   config.json, model.safetensors, its code, the tokenizer   as `save_pretrained` writes them
                     optimizer.pt    the optimizer's state, by the parameters' names
                     rng.pt          the random generators of every process
                     position.json   the loop's own state, see state.py
                     manifest.json   written last: size and sha256 of every other file

The first process writes all of it, from states that are gathered whole. So a checkpoint does not depend on how the
model was wrapped or sharded, and of several machines only the first one needs to have the folder.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from pretraining.checkpoints.folders import GENERATORS, OPTIMIZER, checkpoint_folder, commit, mark_best, rotate
from pretraining.checkpoints.state import Position
from pretraining.distributed.processes import on_main_process
from pretraining.errors import ProcessError, UserError, one_line
from pretraining.files import INCOMPLETE
from pretraining.hardware import restore_generators
from pretraining.records.run_files import WEIGHTS

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """
    The model's weights under their own names, in fp32 and whole: on the first process, and nothing on the others.
    All have to ask, as each may hold a part. Tied weights are there once.
    """
    weights = get_model_state_dict(model, options=FULL_STATE)
    for alias in _aliases(accelerator, model):
        weights.pop(alias, None)
    return weights


class CheckpointWriter:
    """
    Saves checkpoints while training goes on: what they hold is copied at once, by all processes together, and written
    by a thread of the first one. A context manager, which waits for the thread.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
        save_total_limit: how many to keep, beside the best one.
        complete: writes into the folder what the model needs to be used, a tokenizer; called by the thread.
        on_saved: called with the folder and position of each that is written, by the thread.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        model: nn.Module,
        optimizer: Optimizer,
        save_total_limit: int,
        complete: Callable[[Path], None] | None = None,
        on_saved: Callable[[Path, Position], None] | None = None,
    ):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.model = model
        self.optimizer = optimizer
        self.save_total_limit = save_total_limit
        self.complete = complete
        self.on_saved = on_saved
        # One core for its operations: beside a second pool of OpenMP threads those of training sleep where they would
        # wait awake for the next operation, for as long as both are there (docs/experiments.md).
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=torch.set_num_threads, initargs=(1,))
        self._task: Future | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    def save(self, position: Position) -> None:
        """
        Begin to write `checkpoint-<step>`, once the one before it is written. All processes have to call this.

        Raises:
            UserError: on all processes, if the one before could not be written; see `wait`.
        """
        self.wait()
        weights = full_weights(self.accelerator, self.model)
        optimizer = _unwrapped(self.optimizer)
        optimizer_state: dict[str, Any] = {
            "optimizers": get_optimizer_state_dict(self.model, optimizer, options=FULL_STATE)
        }
        if self.accelerator.scaler is not None:
            optimizer_state["scaler"] = self.accelerator.scaler.state_dict()
        generators = gather_object([position.generators])
        position = replace(position, streams=gather_object(position.streams))
        if self.accelerator.is_main_process:
            if self.accelerator.device.type == "cpu":  # from a GPU they are copies already
                weights, optimizer_state = _copied(weights), _copied(optimizer_state)
            self._task = self._thread.submit(self._write, weights, optimizer_state, generators, position)

    def is_writing(self) -> bool:
        return self._task is not None and not self._task.done()

    def has_failed(self) -> bool:
        """Whether the last one could not be written, as far as this process knows, without waiting for it."""
        return self._task is not None and self._task.done() and self._task.exception() is not None

    def wait(self) -> None:
        """
        Until the last checkpoint is written. All processes have to call this.

        Raises:
            UserError: on all processes, if a weight was not finite, or the files could not be written. Earlier
                checkpoints are as they were then.
        """
        task, self._task = self._task, None
        on_main_process(self.accelerator.state, lambda: task and task.result())

    def _write(self, weights: dict, optimizer_state: dict, generators: list, position: Position) -> None:
        step = position.step
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise UserError(
                f"the weights after step {step} are not finite, they are not saved: a lower --learning_rate may help"
            )
        final = checkpoint_folder(self.output_dir, step)
        folder = final.with_name(final.name + INCOMPLETE)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            unwrapped.save_pretrained(folder, state_dict=weights)
            if self.complete:
                self.complete(folder)
            torch.save(optimizer_state, folder / OPTIMIZER)
            torch.save(generators, folder / GENERATORS)
            position.write(folder)
            commit(folder, final)
            rotate(self.output_dir, self.save_total_limit, keep=[final, mark_best(self.output_dir)])
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is what torch.save makes of a full disk
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.output_dir).free / 1e6
            raise UserError(
                f"{final} cannot be written, with {free:,.0f} MB free on the disk: {one_line(error)}; earlier "
                "checkpoints are whole, and the same command goes on from the last one"
            ) from error
        if self.on_saved:
            self.on_saved(final, position)


def load_checkpoint(accelerator: Accelerator, folder: Path, model: nn.Module, optimizer: Optimizer) -> Position:
    """
    Restore model, optimizer and random generators of all processes. Returns the position it was saved with, as it is
    this process's.

    Args:
        folder: a checkpoint that is whole, see `folders.verify`.

    Raises:
        UserError: if its files hold something else than a checkpoint does. Nothing is executed, whatever they hold.
    """
    # Read by the first process; the others get theirs from it, tensor by tensor.
    weights: dict[str, Any] = {}
    optimizer_state: dict[str, Any] = {"optimizers": {}}

    def read() -> tuple[Position, list]:
        try:
            weights.update(_read_weights(folder, accelerator, model))
            optimizer_state.update(torch.load(folder / OPTIMIZER, weights_only=True, mmap=True))
            generators = torch.load(folder / GENERATORS, weights_only=True)
            if not all(isinstance(states["cpu"], torch.ByteTensor) for states in generators):
                raise ValueError(f"{GENERATORS} has no states of generators")
            return Position.read(folder), generators
        except Exception as error:  # whatever bytes that are something else make of these readers
            raise UserError(f"{folder} holds something else than a checkpoint: {one_line(error)}") from error

    position, generators = on_main_process(accelerator.state, read)
    try:
        _restore(accelerator, model, optimizer, weights, optimizer_state)
        _restore_generators(accelerator, generators, position.step)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a state of another model, or of anything
        raise ProcessError(f"{folder} cannot be restored: {one_line(error)}") from error
    return position.of_process(accelerator.process_index)


def _read_weights(folder: Path, accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = load_file(folder / WEIGHTS)
    weights |= {alias: weights[name] for alias, name in _aliases(accelerator, model).items()}
    own = accelerator.unwrap_model(model, keep_torch_compile=False).state_dict()
    if {name: weight.shape for name, weight in weights.items()} != {name: own[name].shape for name in own}:
        raise ValueError("the weights are those of another model")
    return weights


def _restore(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, weights: dict, optimizer_state: dict
) -> None:
    """Restore weights, optimizer and loss scale, which are those of the first process, and empty on the others."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
    set_model_state_dict(model, weights, options=options)
    _restore_optimizer(model, optimizer, optimizer_state["optimizers"], options)
    scaler_state = broadcast_object_list([optimizer_state.get("scaler")])[0]
    if accelerator.scaler is not None and scaler_state:
        accelerator.scaler.load_state_dict(scaler_state)


def _restore_generators(accelerator: Accelerator, generators: list[dict], step: int) -> None:
    if len(generators) == accelerator.num_processes:
        restore_generators(generators[accelerator.process_index], accelerator.device)
    else:  # not the first step's dropout once more
        torch.manual_seed(torch.initial_seed() + step)


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, state: dict, options: StateDictOptions) -> None:
    """
    Restore the optimizer's state, but keep the groups' settings: they follow from the flags of now, which
    --allow_changes may let differ, from the device, and from the version of the program.

    Args:
        state: as it was saved; empty on processes that get theirs from the first one.
    """
    if state:
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        groups = [
            {"params": saved["params"], **values}
            for saved, values in zip(state["param_groups"], settings, strict=True)
        ]
        state = {**state, "param_groups": groups}
    set_optimizer_state_dict(model, _unwrapped(optimizer), state, options=options)


def _aliases(accelerator: Accelerator, model: nn.Module) -> dict[str, str]:
    """Names of tied weights, each with the name under which the same parameter comes first."""
    first: dict[nn.Parameter, str] = {}
    aliases = {}
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    for name, parameter in unwrapped.named_parameters(remove_duplicate=False):
        if parameter in first:
            aliases[name] = first[parameter]
        else:
            first[parameter] = name
    return aliases


def _copied(state: Any) -> Any:
    """The same with tensors of its own, which do not change when those of `state` do."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
