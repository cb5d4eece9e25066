"""Write packed shards: documents become token ids, and token ids become rows of a fixed length in Arrow files."""

import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pretraining.data.packed_rows import full_rows
from pretraining.errors import UserError, counted
from pretraining.files import sha256_of
from pretraining.text.documents import Corpus
from pretraining.tokenization.encoding import encode_documents
from pretraining.tokenization.tokenizer import token_dtype, vocab_size_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_RECORD_BATCH = 1024
COMPRESSION_LIMIT_BYTES = 2 << 20  # xz -9 takes a second for this much


@dataclass(frozen=True)
class PackingSizes:
    """
    Sizes in tokens.

    Attributes:
        block_size: of a row.
        shard_tokens: of a shard.
        max_train_tokens: of the training text, which ends with the document that makes it so many; None for all.
    """

    block_size: int
    shard_tokens: int
    max_train_tokens: int | None = None


def pack(
    documents: Iterator[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sizes: PackingSizes,
    progress: "PackingProgress",
    num_proc: int,
) -> dict[str, dict]:
    """
    Tokenise and write both splits, reading the documents once.

    Args:
        documents: (split, text) pairs.
        num_proc: how many cores tokenise.

    Returns:
        `{"train": statistics, "validation": statistics}` for dataset.json.

    Raises:
        UserError: if the text of a split is less than one row.
    """
    splits = {name: SplitWriter(name, folder, vocab_size_of(tokenizer), sizes) for name in ("train", "validation")}
    with progress:
        for name, text, token_ids in encode_documents(documents, tokenizer, num_proc):
            splits[name].add(text, token_ids)
            progress.update(splits, len(token_ids))
            if splits["train"].is_full:
                break
    return {name: split.close() for name, split in splits.items()}


class PackingProgress:
    """A bar in tokens. Their number is an estimate, from how much of the text they were so far."""

    def __init__(self, corpora: list[Corpus], max_train_tokens: int | None):
        self.size = sum(corpus.size or 0 for corpus in corpora)
        self.num_documents = sum(corpus.num_documents or 0 for corpus in corpora)
        self.max_train_tokens = max_train_tokens

    def __enter__(self) -> "PackingProgress":
        self.bar = tqdm(desc="tokenising", unit="tok", unit_scale=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, splits: dict[str, "SplitWriter"], tokens: int) -> None:
        if not self.bar.update(tokens):
            return  # nothing was drawn
        whole_and_part = [
            (self.size, sum(split.bytes for split in splits.values())),
            (self.num_documents, sum(split.documents for split in splits.values())),
            (self.max_train_tokens, splits["train"].tokens),
        ]
        totals = [self.bar.n * whole / part for whole, part in whole_and_part if whole and part]
        self.bar.total = int(min(totals)) if totals else None


class SplitWriter:
    """One split while it is written: its rows, its counts, and for validation what gzip and xz make of its text."""

    def __init__(self, name: str, folder: Path, vocab_size: int, sizes: PackingSizes):
        self.name = name
        self.writer = ShardWriter(folder / name, sizes.block_size, vocab_size, sizes.shard_tokens)
        self.max_tokens = sizes.max_train_tokens if name == "train" else None
        self.documents = self.tokens = self.bytes = 0
        self.compressed = Compressed() if name == "validation" else None

    @property
    def is_full(self) -> bool:
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    def add(self, text: str, token_ids: np.ndarray) -> None:
        """Of one document, its text and its ids with the end-of-text token."""
        if self.is_full:
            return
        encoded = text.encode()
        self.writer.add(token_ids)
        self.documents += 1
        self.tokens += len(token_ids)
        self.bytes += len(encoded)
        if self.compressed:
            self.compressed.add(encoded)

    def close(self) -> dict:
        dropped = self.writer.close()
        if self.writer.rows == 0:
            documents = counted(self.documents, "document")
            raise UserError(
                f"the {self.name} text is {self.tokens} tokens in {documents}, less than one row of --block_size "
                f"{self.writer.block_size}: more text or a smaller --block_size is needed"
            )
        statistics = {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "dropped_tokens": dropped,
            "rows": self.writer.rows,
            "shards": self.writer.shards,
        }
        if self.compressed:
            statistics["compressed_bytes"] = self.compressed.sizes()
        return statistics


class Compressed:
    """
    What `gzip -9` and `xz -9` need for a text: a yardstick for the model's bits per byte on the same text. Of a text
    beyond COMPRESSION_LIMIT_BYTES nothing is kept, as it would take them minutes.
    """

    def __init__(self):
        self.texts: list[bytes] = []
        self.read = 0

    def add(self, text: bytes) -> None:
        self.read += len(text)
        if self.read <= COMPRESSION_LIMIT_BYTES:
            self.texts.append(text)
        else:
            self.texts.clear()

    def sizes(self) -> dict[str, int] | None:
        """Bytes by program, or None beyond the limit."""
        if self.read > COMPRESSION_LIMIT_BYTES:
            return None
        text = b"".join(self.texts)
        return {
            "gzip -9": len(gzip.compress(text, compresslevel=9)),
            "xz -9": len(lzma.compress(text, preset=9)),
        }


class ShardWriter:
    """
    Writes one split: `add` token ids of any length, get full rows in `shard-00000.arrow`, `shard-00001.arrow`, ...

    The bytes depend only on the ids and on the arguments, not on how the ids were handed over. It holds
    one record batch and one document in memory, however much is written.
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
        self._tokens: list[np.ndarray] = []  # not written yet
        self._num_tokens = 0

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards) + self._rows_in_shard

    def add(self, token_ids: np.ndarray) -> None:
        self._tokens.append(token_ids)
        self._num_tokens += len(token_ids)
        if self._num_tokens >= ROWS_PER_RECORD_BATCH * self.block_size:
            self._write_rows()

    def close(self) -> int:
        """Write what is left. Returns the number of tokens in the last, short row, which is dropped."""
        if self._tokens:
            self._write_rows(is_end=True)
        self._close_shard()
        return self._num_tokens

    def _write_rows(self, is_end: bool = False) -> None:
        """Write the full rows among the tokens at hand as record batches of a full size; at the end, all of them."""
        rows, rest = full_rows(np.concatenate(self._tokens, dtype=self.dtype, casting="safe"), self.block_size)
        while len(rows):
            # A record batch ends where its shard does.
            size = min(ROWS_PER_RECORD_BATCH, self.rows_per_shard - self._rows_in_shard)
            if len(rows) < size and not is_end:
                break
            self._write_record_batch(rows[:size])
            rows = rows[size:]
        rest = np.append(rows, rest)
        self._tokens, self._num_tokens = [rest], len(rest)

    def _write_record_batch(self, rows: np.ndarray) -> None:
        import pyarrow as pa

        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._shard_path(), self.schema)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self.block_size)
        self._stream.write_batch(pa.record_batch([column], schema=self.schema))
        self._rows_in_shard += len(rows)
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
