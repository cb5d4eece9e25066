"""Where documents come from."""

import bisect
import glob
import hashlib
import itertools
import json
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

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pretraining.data.sources import TextSource
from pretraining.errors import UserError, one_line

# datasets logs what it could not read before it raises; the error says it once.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

logger = logging.getLogger(__name__)

ROWS_PER_READ = 64
RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)  # five minutes: a Hub that is restarted
KINDS = (".txt", ".jsonl", ".json", ".parquet")


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
            values = columns[self.text_column]
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
        documents=_text_files(files),
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
    kinds = {path.suffix for path in files}
    if len(kinds) > 1 or not kinds <= set(KINDS):
        raise UserError(f"{pattern} matches {', '.join(sorted(kinds))}: give files of one kind, {', '.join(KINDS)}")
    num_documents = None
    if kinds == {".txt"}:
        documents, text_column = _text_files(files), "text"
    elif kinds == {".parquet"}:
        num_documents = sum(map(_rows_of_parquet, files))
        documents = load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=True)
        documents = _text_as_bytes(documents, text_column)
    else:
        documents = IterableDataset.from_generator(_read_json_lines, gen_kwargs={"files": list(map(str, files))})
    return Corpus(
        documents=documents,
        text_column=text_column,
        description={
            "name": files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}",
            "revision": _digest(files),
            "files": len(files),
        },
        size=_total_size(files) if kinds != {".parquet"} else None,
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
            revision = _digest(sorted(path for path in Path(name).rglob("*") if path.is_file()))
        else:
            revision = HfApi().dataset_info(name, revision=revision).sha
        commit = None if is_local else revision
        documents = load_dataset(name, config, split="train", revision=commit, streaming=True)
    except Exception as error:  # no such dataset, revision or configuration, no network, or files nobody can read
        raise UserError(f"--dataset_name {name} cannot be loaded: {one_line(error)}") from None
    description = {"name": Path(name).resolve().name if is_local else name, "config": config, "revision": revision}
    splits = documents.info.splits or {}
    num_documents = splits["train"].num_examples if "train" in splits else None
    return Corpus(_text_as_bytes(documents, text_column), text_column, description, num_documents=num_documents)


def valid_text(value: str | bytes) -> str:
    """The text with U+FFFD for what is not Unicode: invalid UTF-8, or half a surrogate pair, as JSON can spell it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")


def _text_files(files: list[Path]) -> IterableDataset:
    return IterableDataset.from_generator(_read_text_files, gen_kwargs={"files": list(map(str, files))})


def _read_text_files(files: list[str]) -> Iterator[dict]:
    """As bytes. (`load_dataset("text")` opens files in text mode, which turns \\r\\n into \\n.)"""
    for name in files:
        content = Path(name).read_bytes()
        beginning = content[:1024]
        strange = beginning.count(b"\0") + beginning.decode(errors="replace").count("\ufffd")
        if strange > len(beginning) / 4:  # a file of another kind, not a few bytes that went wrong
            raise UserError(f"{name} is no text in UTF-8 (`iconv -f UTF-16 -t UTF-8` converts some)")
        yield {"text": content}


def _read_json_lines(files: list[str]) -> Iterator[dict]:
    """One object a line. (`load_dataset("json")` wants every column to have one type throughout, and valid UTF-8.)"""
    for name in files:
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8", errors="surrogateescape"))
                except json.JSONDecodeError as error:
                    raise UserError(f"line {number} of {Path(name).name} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {Path(name).name} is a {type(row).__name__}, not an object")
                yield row if line.isascii() else {key: _original_bytes(value) for key, value in row.items()}


def _original_bytes(value: object) -> object:
    """A string as it was in the file, if it has bytes that are not UTF-8; anything else as it is."""
    try:
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    except UnicodeEncodeError:
        return value


def _text_as_bytes(documents: IterableDataset, text_column: str) -> IterableDataset:
    """Only the text's column, as bytes: as a string, invalid UTF-8 in an Arrow column would be an error."""
    features = documents.features or {}
    if text_column not in features:
        return documents  # the columns are not known before reading, or the text's is not among them
    documents = documents.select_columns([text_column])
    is_text = features[text_column] in (Value("string"), Value("large_string"))
    return documents.cast_column(text_column, Value("binary")) if is_text else documents


def _is_transient(error: BaseException | None) -> bool:
    """Whether a fault is the network's or the Hub's, and may be over soon."""
    if error is None:
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status in (408, 429) or status >= 500
    of_a_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "aiohttp")
    return of_a_client or isinstance(error, ConnectionError | TimeoutError) or _is_transient(error.__cause__)


def _rows_of_parquet(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def _digest(files: list[Path]) -> str:
    """Of names, sizes, and the first and last 64 KB of each: all of a corpus would take long at every start."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)
