"""
Files of text, read as streams of rows that have the text in one column: .txt, JSON lines, Parquet, and what datasets
on the Hub are made of.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder, Features, IterableDataset, Value
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from pretraining.errors import UserError, one_line

KINDS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = {".gz": "gunzip -k", ".zst": "unzstd", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zip": "unzip"}
TEXT_TYPES = [Value(name) for name in ("string", "large_string", "string_view", "binary", "large_binary", "null")]


def check_kinds(pattern: str, files: list[Path]) -> str:
    """
    Return the kind of file that all of them are, one of KINDS.

    Raises:
        UserError: if they are of several kinds, or of one that cannot be read.
    """
    packed = next((path for path in files if path.suffix.lower() in COMPRESSED), None)
    if packed is not None:
        command = f"{COMPRESSED[packed.suffix.lower()]} {packed}"
        raise UserError(f"{packed} is compressed: unpack it first (`{command}` does)")
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1 or not kinds <= set(KINDS):
        found = ", ".join(sorted(kind or "files without a suffix" for kind in kinds))
        raise UserError(f"{pattern} matches {found}: give files of one kind, {', '.join(KINDS)}")
    return kinds.pop()


def read_files(kind: str, files: list[Path], text_column: str) -> IterableDataset:
    """Read files of one kind, in their order. Of .txt files the column is always `text`."""
    names = list(map(str, files))
    if kind == ".txt":
        return IterableDataset.from_generator(_read_text_files, gen_kwargs={"files": names})
    if kind == ".parquet":
        return read_text_column(Parquet(data_files={"train": names}), text_column)
    return IterableDataset.from_generator(_read_json_lines, gen_kwargs={"files": names})


def read_text_column(builder: DatasetBuilder, text_column: str) -> IterableDataset:
    """
    Read the train split of a dataset. Of Parquet, Arrow and JSON files the text's column is read alone, as others may
    differ from file to file. Text comes as bytes, as invalid UTF-8 in an Arrow column of strings would be an error.
    """
    kind = next((reader for reader in READERS if isinstance(builder, reader)), None)
    if kind is not None:
        builder.__class__ = READERS[kind]  # the same builder, but for how it makes tables
    documents = builder.as_streaming_dataset(split="train")
    features = documents.features or {}
    if text_column not in features:
        return documents  # the columns are not known before reading, or the text's is not among them
    is_text = features[text_column] in TEXT_TYPES
    if kind is not None:
        builder.info.features = Features({text_column: Value("binary") if is_text else features[text_column]})
        if kind is Parquet:
            builder.config.columns = [text_column]
        documents = builder.as_streaming_dataset(split="train")
    documents = documents.select_columns([text_column])
    return documents.cast_column(text_column, Value("binary")) if is_text else documents


def rows_of_parquet(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def digest_of_files(files: list[Path]) -> str:
    """
    Return a digest of names, sizes, and the first and last 64 KB of each: to read all of a corpus would take long at
    every start.
    """
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _keep_known_columns(table: pa.Table, features: Features | None) -> pa.Table:
    return table if features is None else table.select([name for name in features if name in table.column_names])


class _ParquetText(Parquet):
    def _generate_tables(self, files: list[str], row_groups_list: list) -> Iterator:
        for file, row_groups in zip(files, row_groups_list, strict=True):
            yield from _naming_the_file(file, super()._generate_tables([file], [row_groups]))


class _ArrowText(Arrow):
    def _generate_tables(self, files: list[str]) -> Iterator:
        for file in files:
            yield from _naming_the_file(file, super()._generate_tables([file]))

    def _cast_table(self, table: pa.Table) -> pa.Table:
        return super()._cast_table(_keep_known_columns(table, self.info.features))


class _JsonText(Json):
    def _generate_tables(
        self, base_files: list, files_iterables: list, original_files: list, allow_full_read: bool = True
    ) -> Iterator:
        for parts in zip(base_files, files_iterables, original_files, strict=True):
            tables = super()._generate_tables(*([part] for part in parts), allow_full_read)
            yield from _naming_the_file(str(parts[0]), tables)

    def _cast_table(self, table: pa.Table, *args: Any, **kwargs: Any) -> pa.Table:
        return super()._cast_table(_keep_known_columns(table, self.info.features), *args, **kwargs)


READERS: dict[type[DatasetBuilder], type[DatasetBuilder]] = {Parquet: _ParquetText, Arrow: _ArrowText, Json: _JsonText}


def _naming_the_file(file: str, tables: Iterable) -> Iterator:
    try:
        yield from tables
    except (ValueError, TypeError) as error:  # Arrow's and datasets' own, not those of the network
        raise UserError(f"{Path(file).name}: {one_line(error)}") from error


def _read_text_files(files: list[str]) -> Iterator[dict]:
    """
    Yield the text of each file as bytes, without a byte-order mark. (`load_dataset("text")` opens files in text mode,
    which turns \\r\\n into \\n.)
    """
    for name in files:
        content = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8)
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
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                row = _read_json_line(line, number, Path(name).name)
                yield row if line.isascii() else {key: _original_bytes(value) for key, value in row.items()}


def _read_json_line(line: bytes, number: int, name: str) -> dict:
    """
    Raises:
        UserError: if it is not an object.
    """
    try:
        row = json.loads(line.decode("utf-8", errors="surrogateescape"))
        problem = None if isinstance(row, dict) else f"is a {type(row).__name__}, not an object"
    except (ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits too
        row, problem = {}, f"is not JSON: {one_line(error)}"
    if problem and number == 1 and (line.lstrip().startswith(b"[") or line.strip() == b"{"):
        problem = (
            "begins a value of several lines or objects: there has to be one JSON object a line, as "
            "`jq -c '.[]?' IN.json > OUT.jsonl` writes those of an array and `jq -c . IN.json > OUT.jsonl` single ones"
        )
    if problem:
        raise UserError(f"line {number} of {name} {problem}")
    return row


def _original_bytes(value: object) -> object:
    """A string as it was in the file, if it has bytes that are not UTF-8; anything else as it is."""
    try:
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    except UnicodeEncodeError:
        return value
