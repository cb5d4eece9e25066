"""
A data folder, as prepare_data.py writes it: its dataset.json, and its shards, Arrow files of rows of token ids. They
are written once and then read in any order through memory maps.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretraining.data.packed_rows import PackedDataset
from pretraining.errors import UserError
from pretraining.files import sha256_of
from pretraining.hardware import usable_cores
from pretraining.tokenization.tokenizer import token_dtype

DATASET_FILE = "dataset.json"  # what describes a data folder
FORMAT_VERSION = 1


@dataclass
class DataFolder:
    """
    An opened folder of packed rows.

    Attributes:
        name, revision, config: of the text that it was made from; the last is a configuration of a dataset.
        fingerprint: sha256 of what identifies the training rows.
        check: reads every file once and returns what is wrong with them, an empty list if nothing is. It may fill in
            statistics that only that reading tells.
        file_by_file: rows are shuffled within each file, and the files come in their order.
    """

    name: str
    revision: str
    block_size: int
    fingerprint: str
    train: PackedDataset
    validation: PackedDataset
    check: Callable[[], list[str]]
    config: str | None = None
    file_by_file: bool = False


def open_data_folder(folder: Path, tokenizer_fingerprint: str | None = None) -> DataFolder:
    """
    A folder that prepare_data.py wrote, mapped into memory. Its bytes are not read yet: that is what `check` is for.

    Args:
        tokenizer_fingerprint: of the tokenizer that is to be used, if it is not the folder's own.

    Raises:
        UserError: with everything about it that is not as its dataset.json says.
    """
    info = read_data_folder(folder)
    tokenizer, block_size = info["tokenizer"], info["block_size"]
    problems, shards = [], []
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    if tokenizer_fingerprint not in (None, tokenizer["fingerprint"]):
        problems.append(
            f"{folder} was made with a tokenizer of the fingerprint {tokenizer['fingerprint'][:16]}..., the one to be "
            f"used has {tokenizer_fingerprint[:16]}...: its vocabulary is another"
        )
    for split, opened in parts.items():
        for shard in info["splits"][split]["shards"]:
            shards.append(shard)
            try:
                opened += open_arrow_shard(folder / shard["file"], shard, block_size, tokenizer["vocab_size"])
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)

    def check() -> list[str]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(filter(None, pool.map(checksum_problem, (folder / shard["file"] for shard in shards), shards)))

    source = info["source"]["train"]
    return DataFolder(
        name=Path(source["name"]).name if Path(source["name"]).is_absolute() else source["name"],
        revision=source["revision"],
        config=source.get("config"),
        block_size=block_size,
        fingerprint=hashlib.sha256(json.dumps(info["splits"]["train"]["shards"]).encode()).hexdigest(),
        check=check,
        train=PackedDataset(parts["train"], dict(info["splits"]["train"])),
        validation=PackedDataset(parts["validation"], dict(info["splits"]["validation"])),
    )


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
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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


def open_arrow_shard(path: Path, described: dict, block_size: int, vocab_size: int) -> list[np.ndarray]:
    """
    Map a shard of a data folder into memory, checking all that costs no reading of it.

    Args:
        described: its entry in dataset.json.

    Returns:
        Its record batches, each (rows, block_size).

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
    except (pa.ArrowException, OSError, LookupError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged, it is no Arrow stream of rows ({error}): prepare it again") from None
    expected = (described["rows"], block_size, str(token_dtype(vocab_size)))
    if found != expected:
        has, wanted = ("{} rows of {} tokens of type {}".format(*each) for each in (found, expected))
        raise UserError(f"{path} has {has}, dataset.json has {wanted}: prepare the data again")
    return [batch.reshape(-1, block_size) for batch in batches]


def checksum_problem(path: Path, described: dict) -> str | None:
    """What is wrong with the bytes of a shard of a data folder, by dataset.json; None if they are as written."""
    found = sha256_of(path)
    if found == described["sha256"]:
        return None
    return f"{path} is damaged: its sha256 is {found}, dataset.json has {described['sha256']}; prepare the data again"
