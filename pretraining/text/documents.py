"""Where documents come from."""

import bisect
import glob
import itertools
import logging
import random
import sys
import sysconfig
import textwrap
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import IterableDataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pretraining.errors import UserError, one_line
from pretraining.hub import RETRY_SECONDS
from pretraining.text.sources import TextSource
from pretraining.text.text_files import check_kinds, digest_of_files, read_files, read_text_column, rows_of_parquet

# datasets logs what it could not read before it raises; the error says it once.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

logger = logging.getLogger(__name__)

ROWS_PER_READ = 64


@dataclass
class Corpus:
    """
    Documents that can be read again from the start, in the same order. Iterating yields their texts, each a valid
    string that is not empty.

    Attributes:
        documents: rows with a string, UTF-8 bytes or null under `text_column`.
        description: where they come from, for dataset.json and the model card. Holds no local path.
        size, num_documents: bytes of text, or documents, if known before reading; for the progress bar.
    """

    documents: IterableDataset
    text_column: str
    description: dict
    size: int | None = None
    num_documents: int | None = None
    _without_text: array = field(default_factory=lambda: array("q"))  # how many texts came before each
    _with_invalid_utf8: array = field(default_factory=lambda: array("q"))
    _start: dict | None = None  # the state to read from

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.batches())

    def batches(self) -> Iterator[list[str]]:
        """
        The texts of `ROWS_PER_READ` rows at a time; a list may be empty. After each, `state_dict()` is where the next
        begins.
        """
        del self._without_text[:], self._with_invalid_utf8[:]
        before = 0
        for number, columns in enumerate(self._reads()):
            if self.text_column not in columns and (number > 0 or self._start is not None):
                columns = {self.text_column: [None] * len(next(iter(columns.values())))}  # it is in other rows
            if self.text_column not in columns:
                names = ", ".join(sorted(columns))
                raise UserError(f"--text_column {self.text_column}: no such column, the data has: {names}")
            # pandas writes NaN for a value that is missing.
            values = [None if value != value else value for value in columns[self.text_column]]
            for value in values:
                if value is not None and not isinstance(value, str | bytes):
                    kind, shown = type(value).__name__, textwrap.shorten(str(value), 60)
                    raise UserError(f"--text_column {self.text_column}: a row holds a {kind} and no text: {shown}")
            texts: list[str] = []
            for value in values:
                if not value:
                    self._without_text.append(before + len(texts))
                    continue
                texts.append(valid_text(value))
                if texts[-1] != value and texts[-1].encode() != value:
                    self._with_invalid_utf8.append(before + len(texts) - 1)
            before += len(texts)
            yield texts

    def state_dict(self) -> dict:
        """Where the current reading of `batches` stands, for `load_state_dict` of this corpus opened anew."""
        return self.documents.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Have `batches` begin there."""
        self._start = state

    def counts(self, texts: int | None = None) -> dict[str, int]:
        """
        Of the last or current iteration, up to its first `texts` texts: documents `without_text` (null or empty, which
        are left out) and `with_invalid_utf8` (each invalid sequence became U+FFFD).
        """
        limit = sys.maxsize if texts is None else texts
        return {
            "without_text": bisect.bisect_left(self._without_text, limit),
            "with_invalid_utf8": bisect.bisect_left(self._with_invalid_utf8, limit),
        }

    def share(self, index: int, count: int, epoch: int, seed: int) -> "Corpus":
        """
        One of `count` shares of the documents, which together are all of them, once: by files, in an order of their
        own in each epoch, or where there are fewer files than shares, every `count`-th document of each.
        """
        documents = self.documents
        if documents.num_shards < count:
            documents = documents.reshard()  # Parquet files into their row groups, other files as they are
        strategy = "shards" if documents.num_shards >= count else "examples"
        documents = split_dataset_by_node(documents, rank=index, world_size=count, strategy=strategy)
        # datasets shuffles the files by the epoch's number if that is not 0.
        documents.set_epoch(random.Random(f"{seed}-{epoch}").randrange(1, 1 << 30))
        return Corpus(documents, self.text_column, self.description)

    def _reads(self) -> Iterator[dict[str, list]]:
        """
        Some rows at once, by column: several times as fast as single rows where they are stored by column. After a
        fault of the network it goes on from the end of the last read.
        """
        reads, waits, state = self._read_from(self._start), list(RETRY_SECONDS), self._start
        while True:
            try:
                columns = next(reads)
            except StopIteration:
                return
            except Exception as error:  # of a dozen kinds: JSON, Arrow, Parquet, encodings, the network
                name = self.description["name"]
                if not (waits and _is_transient(error)):
                    raise UserError(f"{name} cannot be read: {one_line(error)}") from error
                logger.warning(f"{name}: {one_line(error)}; trying again in {waits[0]} s, {len(waits)} tries left")
                time.sleep(waits.pop(0))
                reads = self._read_from(state)
                continue
            state, waits = self.state_dict(), list(RETRY_SECONDS)
            yield columns

    def _read_from(self, state: dict | None) -> Iterator[dict[str, list]]:
        self.documents.load_state_dict(state)  # None: from the beginning, whatever was loaded before
        return self.documents.iter(ROWS_PER_READ)


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
        documents=read_files(".txt", files, "text"),
        text_column="text",
        description={"name": "the Python standard library", "revision": version, "files": len(files)},
        size=_total_size(files),
    )


def open_texts(source: TextSource) -> tuple[Corpus, Corpus | None]:
    """The text of a source for training, and that for validation if it is given apart."""
    if not source.train_file:
        config, revision = source.dataset_config_name, source.dataset_revision
        return hub_corpus(str(source.dataset_name), config, revision, source.text_column), None
    apart = local_corpus(source.validation_file, source.text_column) if source.validation_file else None
    return local_corpus(source.train_file, source.text_column), apart


def local_corpus(pattern: str, text_column: str = "text") -> Corpus:
    """
    Files matching a glob: `.txt` (one document a file), `.jsonl` or `.parquet` (one document a row).

    Raises:
        UserError: if nothing matches, or the files are of an unknown kind or of several.
    """
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if Path(pattern).is_dir():
        raise UserError(f"{pattern} is a folder: give a pattern of files, in quotes, as '{pattern}/*.txt'")
    if not files:
        raise UserError(f"no such file: {pattern}")
    kind = check_kinds(pattern, files)
    num_documents = sum(map(rows_of_parquet, files)) if kind == ".parquet" else None
    return Corpus(
        documents=read_files(kind, files, text_column),
        text_column="text" if kind == ".txt" else text_column,
        description={
            "name": files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}",
            "revision": digest_of_files(files),
            "files": len(files),
        },
        size=_total_size(files) if kind != ".parquet" else None,
        num_documents=num_documents,
    )


def hub_corpus(name: str, config: str | None, revision: str | None, text_column: str) -> Corpus:
    """
    The train split of a dataset on the Hugging Face Hub, streamed, of the commit that `revision` is now. Or of one in
    a folder, whose name alone is told, and whose revision is a digest of its files.
    """
    is_local = Path(name).is_dir()
    try:
        if is_local:
            revision = digest_of_files(sorted(path for path in Path(name).rglob("*") if path.is_file()))
        else:
            revision = HfApi().dataset_info(name, revision=revision).sha
        commit = None if is_local else revision
        builder = load_dataset_builder(name, config, revision=commit)
        documents = read_text_column(builder, text_column)
    except Exception as error:  # no such dataset, revision or configuration, no network, or files nobody can read
        raise UserError(f"--dataset_name {name} cannot be loaded: {one_line(error)}") from None
    description = {"name": Path(name).resolve().name if is_local else name, "config": config, "revision": revision}
    splits = builder.info.splits or {}
    num_documents = splits["train"].num_examples if "train" in splits else None
    return Corpus(documents, text_column, description, num_documents=num_documents)


def valid_text(value: str | bytes) -> str:
    """The text with U+FFFD for what is not Unicode: invalid UTF-8, or half a surrogate pair, as JSON can spell it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")


def _is_transient(error: BaseException | None) -> bool:
    """Whether a fault is the network's or the Hub's, and may be over soon."""
    if error is None:
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status in (408, 429) or status >= 500
    of_a_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "aiohttp")
    return of_a_client or isinstance(error, ConnectionError | TimeoutError) or _is_transient(error.__cause__)


def _total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)
