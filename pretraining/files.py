"""Files that are whole or not there, and their sums."""

import hashlib
import os
from pathlib import Path

INCOMPLETE = ".incomplete"  # at the end of a name: not finished, of a program at work or one that was killed


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in one move: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + INCOMPLETE)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
