"""
Folders of token files that other projects write, read as they are.

| files | written by | what is in them |
|---|---|---|
| `edufineweb_{train,val}_000000.npy` | build-nanogpt's fineweb.py | one array of uint16 |
| `*_{train,val}*.bin` | llm.c's data scripts | 256 int32 (magic 20240520, version 1, number of tokens), then uint16 |
| `train.bin`, `val.bin` | nanoGPT's prepare.py | uint16 and nothing else |

They hold no tokenizer and no checksums. What can be checked is: that each is as long as it says, and that its ids are
within the tokenizer's vocabulary. Validation rows overlap by a token, so that every token of them but the very first
is predicted, as in the validation losses that those projects publish.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretraining.data.data_folder import DataFolder
from pretraining.data.packed_rows import PackedDataset, full_rows
from pretraining.errors import UserError, one_line
from pretraining.tokenization.byte_level_bpe import bytes_of_tokens

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 256 * 4
LLMC_LLAMA3_MAGIC = 20240801
ROWS_PER_READ = 4096


def split_of(path: PurePath) -> str | None:
    """Return the split that the name of a token file tells, None of a file that is none."""
    if path.suffix not in (".npy", ".bin"):
        return None
    return "train" if "train" in path.name else "validation" if "val" in path.name else None


def token_files(folder: Path) -> dict[str, list[Path]]:
    """Return the token files of other projects in a folder, by split."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return {split: [path for path in files if split_of(path) == split] for split in ("train", "validation")}


def open_borrowed_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, block_size: int) -> DataFolder:
    """
    Map the token files of a folder into memory, as rows of `block_size` ids; what is left of each file is dropped.

    Raises:
        UserError: with everything that is wrong with them, or if there are none for one of the splits.
    """
    sizes = bytes_of_tokens(tokenizer)
    if sizes is None:
        raise UserError(f"{folder} holds token files, which need a byte-level BPE such as GPT-2's as --tokenizer_name")
    paths = token_files(folder)
    files = _open_token_files(folder, paths, block_size)
    splits = {split: token_dataset(opened, block_size) for split, opened in files.items()}

    def check() -> list[str]:
        return [
            problem for split, dataset in splits.items() for problem in count(dataset, paths[split], tokenizer, sizes)
        ]

    listing = "".join(f"{path.name} {path.stat().st_size} {block_size}\n" for path in paths["train"])
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return DataFolder(
        name=f"{len(paths['train'])} files, {paths['train'][0].name} and on",
        revision=digest[:16],
        block_size=block_size,
        fingerprint=digest,
        check=check,
        train=splits["train"],
        validation=splits["validation"],
    )


def _open_token_files(folder: Path, paths: dict[str, list[Path]], block_size: int) -> dict[str, list[np.ndarray]]:
    files: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    problems: list[str] = []
    for split, opened in files.items():
        for path in paths[split]:
            try:
                opened.append(open_token_file(path, block_size, overlap=split == "validation"))
            except UserError as error:
                problems += error.problems
        if not paths[split]:
            word = {"train": "train", "validation": "val"}[split]
            problems.append(f"{folder} has no .npy or .bin file with '{word}' in its name")
    if problems:
        raise UserError(*problems)
    return files


def token_dataset(parts: Sequence[Any], block_size: int) -> PackedDataset:
    """Return a split, whose documents and bytes `count` will tell."""
    tokens = sum(map(len, parts)) * block_size
    return PackedDataset(parts, {"documents": None, "tokens": tokens, "bytes": None}, block_size)


def count(
    dataset: PackedDataset, paths: list[Path], tokenizer: PreTrainedTokenizerBase, sizes: np.ndarray
) -> list[str]:
    """
    Read all of a split, and complete its statistics. Returns what is wrong with its ids.

    Args:
        sizes: bytes of text by token id.
    """
    problems, documents, size, vocab_size = [], 0, 0, len(sizes)
    for path, rows in zip(paths, dataset.parts, strict=True):
        for start in range(0, len(rows), ROWS_PER_READ):
            ids = rows[start : start + ROWS_PER_READ, -dataset.block_size :]  # each token of the file once
            largest = int(ids.max())
            if largest >= vocab_size:
                problems.append(
                    f"{path} has the token id {largest}, where the tokenizer {tokenizer.name_or_path} has ids up to "
                    f"{vocab_size - 1}: it was made with another one"
                )
                break
            documents += int((ids == tokenizer.eos_token_id).sum())
            size += int(sizes[ids].sum())
    dataset.statistics |= {"documents": documents, "bytes": size}
    return problems


def open_token_file(path: Path, block_size: int, overlap: bool = False) -> np.ndarray:
    """
    Map a token file into memory.

    Returns:
        Its full rows (rows, block_size), or with `overlap` (rows, block_size + 1), of which each begins with the last
        token of the one before.

    Raises:
        UserError: if it is damaged, of another format, or too short.
    """
    tokens = open_tokens(path)
    if len(tokens) < block_size + overlap:
        row = f"one row of --block_size {block_size}" + (" and the token that follows it" if overlap else "")
        raise UserError(f"{path} has {len(tokens)} tokens, less than {row}")
    if overlap:
        return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size]
    return full_rows(tokens, block_size)[0]


def open_tokens(path: Path) -> np.ndarray:
    """Map the tokens of a file into memory, and raise a UserError if it is damaged or of another format."""
    return _open_npy(path) if path.suffix == ".npy" else _open_bin(path)


def _open_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is parsed as Python's, whose errors are many
        raise UserError(f"{path} is damaged, it is no NumPy array: {one_line(error)}") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} is damaged, it is a NumPy archive and no array")
    if tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise UserError(f"{path} has {tokens.dtype} of shape {tokens.shape}, where token files have uint16 in a row")
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    """llm.c's form if it begins with that magic number (no GPT-2 text begins with its two tokens), else nanoGPT's."""
    size = path.stat().st_size
    if size % 2 or not size:
        raise UserError(f"{path} has {size} bytes, which is not a number of 2-byte tokens above 0")
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and header[0] == LLMC_LLAMA3_MAGIC:
        raise UserError(f"{path} holds llm.c's tokens of Llama 3, in 4 bytes each: this program reads those of GPT-2")
    if len(header) < 3 or header[0] != LLMC_MAGIC:
        return np.memmap(path, dtype="<u2", mode="r")
    version, num_tokens = int(header[1]), int(header[2])
    if version != LLMC_VERSION:
        raise UserError(f"{path} is of llm.c's version {version}, this program reads version {LLMC_VERSION}")
    expected = LLMC_HEADER_BYTES + 2 * num_tokens
    if size != expected:
        raise UserError(f"{path} has {size} bytes, but its header says {num_tokens} tokens: {expected} bytes")
    return np.memmap(path, dtype="<u2", mode="r", offset=LLMC_HEADER_BYTES)
