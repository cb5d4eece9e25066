"""
The checkpoints in a run folder: which of them are whole, which to go on from, and which to keep.

A checkpoint is a folder `checkpoint-<step>` of plain files, listed with size and sha256 in its manifest.json. It comes
under that name in one move, when it is whole, and leaves it in one move, before it is deleted; in between it is named
INCOMPLETE. Other folders and links, whatever their names, are somebody else's.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretraining.checkpoints.state import POSITION_FILE
from pretraining.errors import UserError
from pretraining.files import INCOMPLETE, sha256_of, sync, write_text
from pretraining.records.metrics import read_metrics
from pretraining.records.run_files import EVENTS, IDENTITY, METRICS, TRAINING_ARGS, WEIGHTS

MANIFEST = "manifest.json"
OPTIMIZER, GENERATORS = "optimizer.pt", "rng.pt"
FILES = ("config.json", WEIGHTS, OPTIMIZER, GENERATORS, POSITION_FILE)
# Names that `checkpoint-*` does not match, by which people and programs look for the newest one.
BEST = "best-checkpoint"
ABANDONED = "abandoned-"
DELETED = "deleted-"
# What else has a name with INCOMPLETE while it is made:
FINAL, HUB, STOCK = "final", "hub", "stock"  # the last model; on their way to the Hub: a checkpoint, a stock GPT-2
UNFINISHED = (BEST, FINAL, HUB, STOCK, TRAINING_ARGS, IDENTITY, METRICS, EVENTS)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name, or None if the name is not a checkpoint's."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def commit(folder: Path, final: Path) -> None:
    """Write the manifest of a folder's files, flush all to the disk, and give it its final name."""
    with ThreadPoolExecutor(2) as pool:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        files = {path.name: description for path, description in zip(paths, pool.map(_describe, paths), strict=True)}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    sync(folder / MANIFEST)
    sync(folder)
    if final.exists():  # not of this run, or it would have been set aside when the run went on from an earlier one
        _set_aside(final)
    os.replace(folder, final)
    sync(final.parent)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by its manifest: an empty list if it is whole."""
    manifest = folder / MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        return [f"{folder} is not a whole checkpoint: it has no {MANIFEST}"]
    try:
        files = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        if not all(isinstance(name, str) for name in files):
            return [f"{manifest} is damaged"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return [f"{manifest} is damaged"]
    problems = [
        f"{folder} has no {name} in its {MANIFEST}: another version wrote it" for name in FILES if name not in files
    ]
    # Anybody can have written it: only what lies in the folder itself is looked at.
    strange = [name for name in files if name != Path(name).name or os.path.islink(folder / name)]
    problems += [f"{manifest} names {name!r}, which is not a plain file in the folder" for name in strange]
    plain = [name for name in files if name not in strange]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: _problem(folder / name, *sizes[name]), plain)
        return problems + [problem for problem in found if problem]


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, oldest first, with those that have lost files."""
    found = [
        folder
        for folder in output_dir.glob("checkpoint-*")
        if step_of(folder) is not None
        and folder.is_dir()
        and not folder.is_symlink()
        and any((folder / name).exists() for name in (MANIFEST, *FILES))
    ]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that have a manifest, oldest first."""
    return [folder for folder in checkpoints(output_dir) if (folder / MANIFEST).is_file()]


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path | None, list[str]]:
    """
    Args:
        resume_from_checkpoint: `auto` (the last whole one of `output_dir`), `none`, or a checkpoint's folder.

    Returns:
        The checkpoint, None if there is none to go on from, and what is wrong with later ones that are passed over.

    Raises:
        UserError: if the folder that was named is not a whole checkpoint, or `output_dir` has only damaged ones.
    """
    if resume_from_checkpoint == "none":
        return None, []
    if resume_from_checkpoint != "auto":
        folder = Path(resume_from_checkpoint)
        problems = verify(folder) if folder.is_dir() else [f"--resume_from_checkpoint {folder}: no such folder"]
        if problems:
            raise UserError(*problems)
        return folder, []
    damages: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        problems = verify(folder)
        if not problems:
            return folder, damages
        damages += problems
    if damages:
        raise UserError(
            *damages,
            f"no checkpoint of {output_dir} is whole: delete it, or choose another --output_dir, to start again",
        )
    for link in output_dir.glob("checkpoint-*"):
        if link.is_symlink() and step_of(link) is not None and (link / MANIFEST).is_file():
            raise UserError(f"{link} is a link: name it, --resume_from_checkpoint {link}, to go on from it")
    return None, []


def remove_litter(output_dir: Path) -> list[Path]:
    """Delete what a program that was killed left half-done. Returns the checkpoints among it, never finished."""
    unfinished = []
    for path in output_dir.glob(f"*{INCOMPLETE}"):
        name = path.name.removesuffix(INCOMPLETE)
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and step_of(Path(name)) is not None:
            unfinished.append(path)
        if name in UNFINISHED or (is_folder and step_of(Path(name.removeprefix(DELETED))) is not None):
            shutil.rmtree(path) if is_folder else path.unlink()
    return sorted(unfinished)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """
    Rename checkpoints of more than `step` steps, where a run goes on from an earlier one: they would be taken for its
    own. Returns them under their new names.
    """
    aside = [_set_aside(folder) for folder in checkpoints(output_dir) if (step_of(folder) or 0) > step]
    if aside:
        mark_best(output_dir)
    return aside


def rotate(output_dir: Path, save_total_limit: int, keep: Iterable[Path | None]) -> None:
    """Delete all but the last `save_total_limit` checkpoints and those of `keep`."""
    for old in complete_checkpoints(output_dir)[:-save_total_limit]:
        if old not in keep:
            condemned = old.with_name(DELETED + old.name + INCOMPLETE)
            os.replace(old, condemned)
            shutil.rmtree(condemned)


def best_checkpoint(output_dir: Path) -> tuple[Path, float] | None:
    """The checkpoint with the lowest evaluation loss, and that loss; None if none was evaluated."""
    lines = read_metrics(output_dir)
    losses = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    folders = [folder for folder in complete_checkpoints(output_dir) if step_of(folder) in losses]
    if not folders:
        return None
    best = min(folders, key=lambda folder: losses[step_of(folder)])
    return best, losses[step_of(best)]


def mark_best(output_dir: Path) -> Path | None:
    """Have `best-checkpoint` point to the best checkpoint, and return that."""
    best = best_checkpoint(output_dir)
    if best is None:
        return None
    final, link = output_dir / BEST, output_dir / (BEST + INCOMPLETE)
    with contextlib.suppress(OSError):  # a file system without links: it is kept all the same
        link.unlink(missing_ok=True)
        link.symlink_to(best[0].name)
        if final.is_dir() and not final.is_symlink():  # as some ways to copy a run leave it
            _set_aside(final)
        os.replace(link, final)
    return best[0]


def _set_aside(folder: Path) -> Path:
    names = (ABANDONED + folder.name + (f".{number}" if number else "") for number in itertools.count())
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    return aside


def _describe(path: Path) -> dict:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _problem(path: Path, size: int, sha256: str) -> str | None:
    if not os.path.isfile(path):  # which a name that is too long is no error for
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} is damaged: it has {path.stat().st_size:,} bytes, not {size:,}"
    return None if sha256_of(path) == sha256 else f"{path} is damaged: its sha256 is not the manifest's"
