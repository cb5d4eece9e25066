"""
A data folder's files: its dataset.json, and its shards, Arrow files of rows of token ids, written once and then read
in any order through the memory map.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretraining.errors import UserError
from pretraining.files import sha256_of
from pretraining.tokenization.tokenizer import token_dtype

DATASET_FILE = "dataset.json"  # what describes a data folder
FORMAT_VERSION = 1


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

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a view of one row (block_size,)."""
        return self.batches[divmod(row, self.batches.shape[1])]


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
