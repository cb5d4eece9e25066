"""
A data folder's files: its dataset.json, and its shards, Arrow files of rows of token ids, written once and then read
in any order through the memory map.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretraining.arguments import UserError
from pretraining.files import sha256_of

if TYPE_CHECKING:  # training on other projects' token files needs no Arrow
    import pyarrow as pa

DATASET_FILE = "dataset.json"  # what describes a data folder
FORMAT_VERSION = 1
ROWS_PER_RECORD_BATCH = 1024


class ShardWriter:
    """
    Writes one split: `add` token ids of any length, get full rows in `shard-00000.arrow`, `shard-00001.arrow`, ...

    The bytes depend only on the ids, `block_size` and `shard_tokens`, not on how the ids were handed over. It holds
    one record batch in memory, however much is written.
    """

    def __init__(self, folder: Path, block_size: int, vocab_size: int, shard_tokens: int):
        from datasets import Features, List, Value  # a second of import, for nothing when only reading

        folder.mkdir(parents=True)
        self.folder = folder
        self.block_size = block_size
        self.dtype = token_dtype(vocab_size)
        self.schema = Features({"input_ids": List(Value(str(self.dtype)), length=block_size)}).arrow_schema
        self.rows_per_shard = max(1, shard_tokens // block_size)
        self.shards: list[dict] = []
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None  # the Arrow stream of the shard being written
        self._rows_in_shard = 0
        self._buffer = np.empty(ROWS_PER_RECORD_BATCH * block_size, self.dtype)
        self._buffered = 0

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards) + self._rows_in_shard

    def add(self, token_ids: np.ndarray) -> None:
        while len(token_ids):
            # A record batch ends where its shard does, so that all of a shard's but the last are of one size.
            rows = min(ROWS_PER_RECORD_BATCH, self.rows_per_shard - self._rows_in_shard)
            room = rows * self.block_size - self._buffered
            part, token_ids = token_ids[:room], token_ids[room:]
            self._buffer[self._buffered : self._buffered + len(part)] = part
            self._buffered += len(part)
            if self._buffered == rows * self.block_size:
                self._write_rows(rows)

    def close(self) -> int:
        """Write what is left. Returns the number of tokens in the last, short row, which is dropped."""
        rows, dropped = divmod(self._buffered, self.block_size)
        if rows:
            self._write_rows(rows)
        self._close_shard()
        return dropped

    def _write_rows(self, rows: int) -> None:
        """The first rows of the buffer as a record batch; what is behind them is forgotten."""
        import pyarrow as pa

        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._shard_path(), self.schema)
        column = pa.FixedSizeListArray.from_arrays(pa.array(self._buffer[: rows * self.block_size]), self.block_size)
        self._stream.write_batch(pa.record_batch([column], schema=self.schema))
        self._rows_in_shard += rows
        self._buffered = 0
        if self._rows_in_shard == self.rows_per_shard:
            self._close_shard()

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self.shards):05d}.arrow"

    def _close_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        path = self._shard_path()
        self.shards.append(
            {
                "file": f"{path.parent.name}/{path.name}",
                "rows": self._rows_in_shard,
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
        )
        self._stream, self._rows_in_shard = None, 0


@dataclass(frozen=True)
class TokenRows:
    """
    The rows of one file, memory-mapped.

    Attributes:
        batches: a view (batches, rows per batch, block_size) into the file. Of the last batch only the rows below
            `num_rows` are there.
    """

    batches: np.ndarray
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")


def read_data_folder(folder: Path) -> dict:
    """
    dataset.json of a data folder.

    Raises:
        UserError: if there is none, or it is of a format that this version cannot read.
    """
    path = Path(folder) / DATASET_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a data folder, it has no dataset.json: make one with prepare_data.py")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["format_version"]
        missing = {"source", "documents", "tokenizer", "block_size", "settings", "splits"} - info.keys()
        if not missing and version == FORMAT_VERSION:
            _check_description(info)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): prepare the data again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    if missing:
        raise UserError(f"{path} is damaged, it has no {', '.join(sorted(missing))}: prepare the data again")
    return info


def _check_description(info: dict) -> None:
    """Raises LookupError or TypeError if something that is read from a dataset.json is missing or of another type."""
    types = {"bytes": int, "rows": int, "file": str, "sha256": str}
    values = [
        (info["block_size"], int),
        (info["tokenizer"]["fingerprint"], str),
        (info["tokenizer"]["vocab_size"], int),
    ]
    values += [(info["source"]["train"][key], str) for key in ("name", "revision")]
    for split in (info["splits"]["train"], info["splits"]["validation"]):
        values += [(split[key], int) for key in ("documents", "tokens", "bytes")]
        values += [(shard[key], kind) for shard in split["shards"] for key, kind in types.items()]
        values.append((split["shards"][0], dict))
    for value, kind in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} where {kind.__name__} is expected")
    for name in (shard["file"] for split in info["splits"].values() for shard in split["shards"]):
        if Path(name).is_absolute() or ".." in Path(name).parts:  # anybody can have written it
            raise LookupError(f"{name} is not in the folder")


def open_arrow_shard(path: Path, described: dict, block_size: int, vocab_size: int) -> TokenRows:
    """
    Map a shard of a data folder into memory, checking all that costs no reading of it.

    Args:
        described: its entry in dataset.json.

    Raises:
        UserError: if it is missing, or of another size, kind, row length or number of rows than described.
    """
    import pyarrow as pa

    if not path.is_file():
        raise UserError(f"{path} is missing: dataset.json lists it; prepare the data again")
    if path.stat().st_size != described["bytes"]:
        sizes = f"{path.stat().st_size} bytes, dataset.json has {described['bytes']}"
        raise UserError(f"{path} is damaged: it has {sizes}; prepare the data again")
    try:
        stream = pa.ipc.open_stream(pa.memory_map(str(path)))
        column = stream.schema.field("input_ids").type
        batches = [batch.column("input_ids").flatten().to_numpy(zero_copy_only=True) for batch in stream]
        found = (sum(map(len, batches)) // column.list_size, column.list_size, str(batches[0].dtype))
    except (pa.ArrowException, OSError, LookupError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged, it is no Arrow stream of rows ({error}): prepare it again") from None
    expected = (described["rows"], block_size, str(token_dtype(vocab_size)))
    if found != expected:
        has, wanted = ("{} rows of {} tokens of type {}".format(*each) for each in (found, expected))
        raise UserError(f"{path} has {has}, dataset.json has {wanted}: prepare the data again")
    return TokenRows(_evenly_spaced(path, batches, block_size), described["rows"])


def checksum_problem(path: Path, described: dict) -> str | None:
    """What is wrong with the bytes of a shard of a data folder, by dataset.json; None if they are as written."""
    found = sha256_of(path)
    if found == described["sha256"]:
        return None
    return f"{path} is damaged: its sha256 is {found}, dataset.json has {described['sha256']}; prepare the data again"


def _evenly_spaced(path: Path, batches: list[np.ndarray], block_size: int) -> np.ndarray:
    """
    The record batches of a mapped file as one view (batches, rows per batch, block_size). All of them but the last
    are of one size, and so lie at even distances; a view of each would make a batch of rows a loop in Python.
    """
    first = batches[0]
    starts = np.array([batch.ctypes.data for batch in batches])
    distances = np.diff(starts)
    sizes = {len(batch) for batch in batches[:-1]} or {len(first)}
    if len(set(distances)) > 1 or sizes != {len(first)} or len(batches[-1]) > len(first):
        raise UserError(f"{path} is not laid out as prepare_data.py does it: prepare the data again")
    distance = int(distances[0]) if len(batches) > 1 else first.nbytes
    shape = (len(batches), len(first) // block_size, block_size)
    strides = (distance, block_size * first.itemsize, first.itemsize)
    return np.lib.stride_tricks.as_strided(first, shape, strides, writeable=False)
