"""Where documents come from, and which of them are for validation."""

import glob
import hashlib
import itertools
import logging
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import IterableDataset, load_dataset

from pretraining.arguments import UserError, one_line

# datasets logs what it could not read before it raises; the error says it once.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """
    Documents that can be read again from the start, in the same order.

    Attributes:
        documents: rows with a string (or null) under `text_column`.
        description: where they come from, for dataset.json and the model card. Holds no local path.
        size: bytes of text if known before reading, for the progress bar.
    """

    documents: IterableDataset
    text_column: str
    description: dict
    size: int | None = None

    def __iter__(self) -> Iterator[str]:
        for index, row in enumerate(self._rows()):
            if self.text_column not in row:
                names = ", ".join(sorted(row))
                raise UserError(f"--text_column {self.text_column}: no such column, the data has: {names}")
            text = row[self.text_column]
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"--text_column {self.text_column}: row {index} holds a {kind} instead of a text")
            if text:  # null and empty documents hold no text
                yield text

    def _rows(self) -> Iterator[dict]:
        rows = iter(self.documents)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of a dozen kinds: JSON, Arrow, Parquet, encodings, the network
                raise UserError(f"{self.description['name']} cannot be read: {one_line(error)}") from error
            yield row


def embedded_corpus() -> Corpus:
    """
    The Python standard library of this interpreter: real text that is always there. One document a `.py` file, in the
    order of their names, without site-packages and the test suites.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus(
        documents=_text_files(files),
        text_column="text",
        description={"name": "the Python standard library", "revision": version, "files": len(files)},
        size=_total_size(files),
    )


def local_corpus(pattern: str, text_column: str = "text") -> Corpus:
    """
    Files matching a glob: `.txt` (one document a file), `.jsonl` or `.parquet` (one document a row).

    Raises:
        UserError: if nothing matches, or the files are of an unknown kind or of several.
    """
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not files:
        raise UserError(f"no such file: {pattern}")
    kinds = {path.suffix for path in files}
    if len(kinds) > 1 or not kinds <= LOADERS.keys():
        raise UserError(f"{pattern} matches {', '.join(sorted(kinds))}: give files of one kind, {', '.join(LOADERS)}")
    loader = LOADERS[kinds.pop()]
    if loader == "text":
        # Not `load_dataset("text")`: it opens files in text mode, which turns \r\n into \n.
        documents, text_column = _text_files(files), "text"
    else:
        empty = [path for path in files if path.stat().st_size == 0]
        if empty:
            raise UserError(f"no text found: {empty[0]} is empty")
        documents = load_dataset(loader, data_files=[str(path) for path in files], split="train", streaming=True)
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    return Corpus(
        documents=documents,
        text_column=text_column,
        description={
            "name": files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}",
            "revision": hashlib.sha256(listing.encode()).hexdigest()[:16],
            "files": len(files),
        },
        size=_total_size(files) if loader != "parquet" else None,
    )


def hub_corpus(name: str, config: str | None, revision: str | None, text_column: str) -> Corpus:
    """The train split of a dataset on the Hugging Face Hub, streamed."""
    try:
        documents = load_dataset(name, config, split="train", revision=revision, streaming=True)
    except (OSError, ValueError) as error:  # not found, no network, no such configuration
        raise UserError(f"--dataset_name {name} cannot be loaded: {one_line(error)}") from None
    description = {"name": name, "config": config, "revision": revision or "main"}
    return Corpus(documents=documents, text_column=text_column, description=description)


def split_documents(documents: Iterable[str], percentage: int, seed: int) -> Iterator[tuple[str, str]]:
    """
    Yield (split, document) for each document: one at random out of every 100 / percentage, wherever in the corpus,
    is for validation. It depends on the document's place and the seed alone, so it is the same on every reading.

    Of a corpus with fewer documents than that, such as a single book, the last `percentage` of the text is for
    validation, cut at the end of a line.
    """
    documents = iter(documents)
    one_stratum = -(-100 // percentage)  # rounded up
    first = list(itertools.islice(documents, one_stratum))
    if len(first) < one_stratum:
        yield from _split_at_the_tail(first, percentage)
        return
    for index, document in enumerate(itertools.chain(first, documents)):
        yield _split_of(index, percentage, seed), document


def _split_of(index: int, percentage: int, seed: int) -> str:
    stratum = index * percentage // 100
    start, stop = (-(-number * 100 // percentage) for number in (stratum, stratum + 1))
    chosen = random.Random(f"{seed}-{stratum}").randrange(start, stop)
    return "validation" if index == chosen else "train"


def _split_at_the_tail(documents: list[str], percentage: int) -> Iterator[tuple[str, str]]:
    """The last `percentage` of the characters is for validation; the document in which they begin is cut."""
    boundary = sum(map(len, documents)) * (100 - percentage) // 100
    for document in documents:
        if boundary >= len(document):
            yield "train", document
        elif boundary <= 0:
            yield "validation", document
        else:
            cut = document.rfind("\n", 0, boundary) + 1 or boundary
            yield "train", document[:cut]
            yield "validation", document[cut:]
        boundary -= len(document)


def _text_files(files: list[Path]) -> IterableDataset:
    return IterableDataset.from_generator(_read_text_files, gen_kwargs={"files": [str(path) for path in files]})


def _read_text_files(files: list[str]) -> Iterator[dict]:
    for name in files:
        yield {"text": Path(name).read_bytes().decode("utf-8", errors="replace")}


def _total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)
