"""Files that are whole or not there, and their sums."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretraining.errors import UserError

INCOMPLETE = ".incomplete"  # at the end of a name: not finished, of a program at work or one that was killed


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in one move: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + INCOMPLETE)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def unwritable(path: Path) -> str | None:
    """Return what keeps a file from being written, as far as it can be seen."""
    if os.path.isdir(path):  # which a name that is too long is no error for
        return "is a folder: give the name of a file"
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        return f"cannot be written: {parent} is not a folder"
    return None if os.access(parent, os.W_OK) else f"cannot be written: no permission to write in {parent}"


@contextlib.contextmanager
def folder_in_progress(final: Path, contents: set[str]) -> Iterator[Path]:
    """
    An empty folder beside `final` to work in, named `final` with INCOMPLETE behind it, which becomes `final` in one
    move if all goes well, and is deleted if not. What a killed program left there is deleted first.

    Args:
        contents: names that the program writes there. A folder with others in it is somebody else's.

    Raises:
        UserError: if another program is working there, or it is somebody else's or cannot be made.
    """
    folder = final.with_name(final.name + INCOMPLETE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the system, however the program ends
        if not (folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())):
            raise BlockingIOError  # the other one has finished just now, and moved it
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"{final} is being written by another program: wait for it, or choose another folder"
        ) from None
    try:
        if foreign := {path.name for path in folder.iterdir()} - contents:
            raise UserError(f"{folder} holds {min(foreign)}, which is not of this program: move it away")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.replace(folder, final)
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """
    Keep other programs out of a folder. The system lets go of it, however the program ends.

    Args:
        busy: what to say if another program is there.

    Raises:
        UserError: if so, or if the folder cannot be written to.
    """
    try:
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            # Unlike flock's, not inherited by a data loader's workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # a file system that has no locks
            pass
        yield


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
