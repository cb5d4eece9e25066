"""
Checkpoints that are whole or not there: written beside their final name, listed in a manifest, then renamed.

checkpoint-000500/   config.json, model.safetensors   as `save_pretrained` writes them
                     optimizer.pt    the optimizers' state, by the parameters' names
                     rng.pt          the random generators of every process
                     position.json   the loop's own state
                     manifest.json   written last: size and sha256 of every other file
best-checkpoint      a link to the one with the lowest evaluation loss

The first process writes all of it, from states that are gathered whole. So a checkpoint does not depend on how the
model was wrapped or sharded, and of several machines only the first one needs to have the folder.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
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

from pretraining.arguments import UserError
from pretraining.files import INCOMPLETE, sha256_of, write_text

# Names that `checkpoint-*` does not match, by which people and programs look for the newest one.
BEST = "best-checkpoint"
ABANDONED = "abandoned-"
FILES = ("model.safetensors", "optimizer.pt", "rng.pt", "position.json")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The model's weights under their own names, in fp32 and whole: on the first process, and nothing on the others.
    All have to ask, as each may hold a part. Tied weights are there once.
    """
    weights = get_model_state_dict(model, options=WHOLE)
    for alias in _aliases(accelerator, model):
        weights.pop(alias, None)
    return weights


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    position: dict,
    stream_position: dict | None,
    save_total_limit: int,
) -> None:
    """
    Write `checkpoint-<step>` of all processes, mark the best one, and delete the oldest of the others beyond
    `save_total_limit`.

    Args:
        model, optimizers: as `accelerator.prepare` returned them.
        position: the loop's own state, JSON; `position["step"]` is the number of optimizer steps done, and
            `position["eval_loss"]` the evaluation loss after it, or None if it was not evaluated.
        stream_position: of this process's stream, JSON, if the data is one.
    """
    weights = full_weights(accelerator, model)
    optimizer_state = {"optimizers": get_optimizer_state_dict(model, _unwrapped(optimizers), options=WHOLE)}
    if accelerator.scaler is not None:
        optimizer_state["scaler"] = accelerator.scaler.state_dict()
    generators = gather_object([_generator_states(accelerator.device)])
    streams = gather_object([stream_position])
    if accelerator.is_main_process:
        final = output_dir / f"checkpoint-{position['step']:06d}"
        folder = final.with_name(final.name + INCOMPLETE)
        shutil.rmtree(folder, ignore_errors=True)
        unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
        unwrapped.save_pretrained(folder, state_dict=weights)
        torch.save(optimizer_state, folder / "optimizer.pt")
        torch.save(generators, folder / "rng.pt")
        position = {**position, "streams": streams}
        write_text(folder / "position.json", json.dumps(position, indent=2) + "\n")
        write_text(folder / "manifest.json", json.dumps({"files": _describe_files(folder)}, indent=2) + "\n")
        _sync(folder / "manifest.json")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        _sync(output_dir)
        best = _mark_best(output_dir)
        for old in complete_checkpoints(output_dir)[:-save_total_limit]:
            if old != best:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    refuse: Callable[[dict], list[str]],
) -> dict:
    """
    Restore model, optimizers and random generators of all processes. Returns the position it was saved with, with this
    process's own `stream`.

    Args:
        refuse: says what speaks against going on from a position; an empty list if nothing does.

    Raises:
        UserError: if a file is missing or is not what the manifest says, or if `refuse` said something. Nothing has
            been changed then.
    """
    found: list = [None, None, None]
    if accelerator.is_main_process:
        problems, position, generators = verify(folder), None, None
        if not problems:
            position = json.loads((folder / "position.json").read_text(encoding="utf-8"))
            generators = torch.load(folder / "rng.pt", weights_only=True)
            problems = refuse(position)
        found = [problems, position, generators]
    # Every process needs the verdict, or the others would go on and wait for the first one for ever.
    problems, position, generators = broadcast_object_list(found)
    if problems:
        raise UserError(*problems)
    weights, optimizer_state = {}, {"optimizers": {}}
    if accelerator.is_main_process:
        weights = load_file(folder / "model.safetensors")
        weights |= {alias: weights[name] for alias, name in _aliases(accelerator, model).items()}
        optimizer_state = torch.load(folder / "optimizer.pt", weights_only=True, mmap=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, _unwrapped(optimizers), optimizer_state["optimizers"], options=options)
    scaler_state = broadcast_object_list([optimizer_state.get("scaler")])[0]
    if accelerator.scaler is not None and scaler_state:
        accelerator.scaler.load_state_dict(scaler_state)
    if len(generators) == accelerator.num_processes:
        _restore_generators(generators[accelerator.process_index], accelerator.device)
    else:  # not the first step's dropout once more
        torch.manual_seed(torch.initial_seed() + position["step"])
    streams = position.pop("streams")
    return {**position, "stream": streams[accelerator.process_index % len(streams)]}


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by its manifest: an empty list if it is whole."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return [f"{folder} is not a complete checkpoint, it has no manifest.json"]
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{manifest} is damaged"]
    problems = [f"{folder} has no {name}: another version wrote it" for name in FILES if name not in files]
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            problems.append(f"{path} is damaged: its size or sha256 is not the manifest's")
    return problems


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that were committed, oldest first. Foreign folders are left alone."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "manifest.json").is_file()
    ]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """
    Args:
        resume_from_checkpoint: `auto` (the last whole one of `output_dir`), `none`, or a checkpoint's folder.

    Raises:
        UserError: if the folder that was named does not exist.
    """
    if resume_from_checkpoint == "none":
        return None
    if resume_from_checkpoint != "auto":
        folder = Path(resume_from_checkpoint)
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {folder}: no such folder")
        return folder
    checkpoints = complete_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """
    Rename checkpoints of more than `step` steps, where a run goes on from an earlier one: they would be taken for its
    own. Returns them under their new names.
    """
    aside = []
    for folder in complete_checkpoints(output_dir):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            aside.append(folder.with_name(ABANDONED + folder.name))
            shutil.rmtree(aside[-1], ignore_errors=True)
            os.replace(folder, aside[-1])
    if aside:
        _mark_best(output_dir)
    return aside


def best_checkpoint(output_dir: Path) -> tuple[Path, float] | None:
    """The checkpoint with the lowest evaluation loss, and that loss; None if none was evaluated."""
    scored = []
    for folder in complete_checkpoints(output_dir):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is not the best
            eval_loss = json.loads((folder / "position.json").read_text(encoding="utf-8"))["eval_loss"]
            if eval_loss is not None and math.isfinite(eval_loss):
                scored.append((eval_loss, folder))
    if not scored:
        return None
    eval_loss, folder = min(scored)
    return folder, eval_loss


def _mark_best(output_dir: Path) -> Path | None:
    """Have `best-checkpoint` point to the best checkpoint, and return that."""
    best = best_checkpoint(output_dir)
    if best is None:
        return None
    final, link = output_dir / BEST, output_dir / (BEST + INCOMPLETE)
    if final.is_dir() and not final.is_symlink():  # as some ways to copy a run leave it
        shutil.rmtree(final)
    with contextlib.suppress(OSError):  # a file system without links: it is kept all the same
        link.unlink(missing_ok=True)
        link.symlink_to(best[0].name)
        os.replace(link, final)
    return best[0]


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


def _unwrapped(optimizers: list[Optimizer]) -> list[Optimizer]:
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]


def _generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])


def _describe_files(folder: Path) -> dict:
    """Size and sha256 of every file below `folder`, each flushed to the disk first."""
    description = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        description[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return description


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
