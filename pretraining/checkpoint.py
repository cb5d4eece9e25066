"""
Checkpoints that are whole or not there: written beside their final name, listed in a manifest, then renamed.

checkpoint-000500/   config.json, model.safetensors, optimizer*.bin, random_states_<rank>.pkl   what accelerate saves
                     position.json   the loop's own state
                     stream_<rank>.json   where a stream stands, if the data is one
                     manifest.json   written last: size and sha256 of every other file
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pretraining.arguments import UserError
from pretraining.files import INCOMPLETE, sha256_of, write_text


def register_model_hooks(accelerator: Accelerator) -> None:
    """
    Have `save_state` write the model as `save_pretrained` does: a checkpoint then loads with `from_pretrained`, and
    its keys do not depend on how the model was wrapped (accelerate would save those of the DDP wrapper).
    """

    def save_model(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(folder)
        weights.clear()  # tells accelerate that they are saved

    def load_model(models: list[torch.nn.Module], folder: str) -> None:
        safetensors.torch.load_model(accelerator.unwrap_model(models.pop()), Path(folder) / "model.safetensors")

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    position: dict,
    stream_position: dict | None,
    save_total_limit: int,
) -> Path:
    """
    Write `checkpoint-<step>` of all processes, then delete the oldest beyond `save_total_limit`.

    Args:
        position: the loop's own state, JSON; `position["step"]` is the number of optimizer steps done.
        stream_position: of this process's stream, JSON, if the data is one.
    """
    final = output_dir / f"checkpoint-{position['step']:06d}"
    folder = final.with_name(final.name + INCOMPLETE)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    if stream_position is not None:
        write_text(_stream_file(folder, accelerator), json.dumps(stream_position) + "\n")
    accelerator.wait_for_everyone()  # save_state does not wait for the other processes' files
    if accelerator.is_main_process:
        write_text(folder / "position.json", json.dumps(position, indent=2) + "\n")
        write_text(folder / "manifest.json", json.dumps({"files": _describe_files(folder)}, indent=2) + "\n")
        _sync(folder / "manifest.json")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        _sync(output_dir)
        for old in complete_checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, folder: Path, refuse: Callable[[dict], list[str]]) -> dict:
    """
    Restore model, optimizers and random generators of all processes. Returns the position it was saved with.

    Args:
        refuse: says what speaks against going on from a position; an empty list if nothing does.

    Raises:
        UserError: if a file is missing or is not what the manifest says, or if `refuse` said something. Nothing has
            been changed then.
    """
    verdict: list = [None, None]
    if accelerator.is_main_process:
        problems, position = verify(folder), None
        if not problems:
            position = json.loads((folder / "position.json").read_text(encoding="utf-8"))
            problems = refuse(position)
        verdict = [problems, position]
    # Every process needs the verdict, or the others would go on and wait for the first one for ever.
    problems, position = broadcast_object_list(verdict)
    if problems:
        raise UserError(*problems)
    accelerator.load_state(str(folder))
    accelerator.step = 0  # accelerate's micro-step counter: a checkpoint is always between two optimizer steps
    return position


def stream_position(accelerator: Accelerator, folder: Path) -> dict | None:
    """What `save_checkpoint` was given by this process; to be asked for after `load_checkpoint`, which checks it."""
    path = _stream_file(folder, accelerator)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by its manifest: an empty list if it is whole."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return [f"{folder} is not a complete checkpoint, it has no manifest.json"]
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{manifest} is damaged"]
    problems = []
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


def _stream_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"stream_{accelerator.process_index}.json"


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
