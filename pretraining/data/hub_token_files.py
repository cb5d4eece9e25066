"""
Token files of other projects in a dataset on the Hub (kjj0/fineweb10B-gpt2 and the like), trained on as they are.

A file is downloaded when its first row is asked for, and then the one behind it. Rows are shuffled within a file, and
files come one after the other, so that a run downloads as many as its steps need. Sizes and checksums come from the
Hub, so all rows can be numbered before any training file is there.
"""

import contextlib
import errno
import functools
import hashlib
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from transformers import PreTrainedTokenizerBase

from pretraining.data.data_folder import DATASET_FILE, DataFolder
from pretraining.data.token_files import count, open_token_file, open_tokens, split_of, token_dataset
from pretraining.errors import UserError, one_line
from pretraining.files import sha256_of
from pretraining.hub import RETRY_SECONDS
from pretraining.tokenization.byte_level_bpe import bytes_of_tokens


@dataclass(frozen=True)
class HubTokenFile:
    """
    A token file on the Hub.

    Attributes:
        name: its path in the repository.
        revision: the commit.
        size: in bytes.
        blob_id: its id in Git, of its content where the Hub holds it in Git itself.
        sha256: None for such a file.
    """

    repo_id: str
    revision: str
    name: str
    size: int
    blob_id: str
    sha256: str | None

    def is_at(self, path: Path) -> bool:
        """Read the file at a path, and return True if it is this one."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return sha256_of(path) == self.sha256
        content = path.read_bytes()  # Git keeps small files alone
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob_id


@functools.cache
def download(file: HubTokenFile) -> Path:
    """
    Return where a file is on this machine, downloaded and checked. Several processes may ask for it at once.

    Raises:
        UserError: if the Hub cannot be reached, or what comes from it is not the file.
    """
    is_forced = False  # a file in the cache that is damaged is downloaded once more
    for pause in (*RETRY_SECONDS, None):
        try:
            path = Path(
                hf_hub_download(
                    file.repo_id, file.name, repo_type="dataset", revision=file.revision, force_download=is_forced
                )
            )
            if file.is_at(path):
                return path
            if is_forced:
                raise OSError("its size or checksum is not the one that the Hub tells")
            is_forced = True
        except Exception as error:  # connections that break, a full disk: of several libraries
            if pause is None or not _may_pass(error):
                raise UserError(f"{file.repo_id}: {file.name} cannot be downloaded: {one_line(error)}") from None
            time.sleep(pause)
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    """Return True for an error that may be gone in a minute: no refusal, and no full disk."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES))


class HubRows:
    """
    The full rows (rows, block_size) of a token file on the Hub, which is downloaded when the first one is asked for.

    Args:
        num_rows: as the file's size tells.
        following: the file to download next, None for the last one.
        vocab_size: of the tokenizer.
    """

    dtype = np.dtype("<u2")

    def __init__(
        self, file: HubTokenFile, num_rows: int, block_size: int, following: HubTokenFile | None, vocab_size: int
    ):
        self.file = file
        self.shape = num_rows, block_size
        self.following = following
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        return self._rows[row]

    @cached_property
    def _rows(self) -> np.ndarray:
        """
        Raises:
            UserError: if the file cannot be downloaded, is damaged, or was made with another tokenizer.
        """
        path, name = download(self.file), f"{self.file.repo_id}: {self.file.name}"
        rows = open_token_file(path, self.shape[1])
        if rows.shape != self.shape:
            raise UserError(f"{name} has {len(rows)} rows, where a file of its size should have {len(self)}")
        if (largest := int(rows.max())) >= self.vocab_size:
            raise UserError(
                f"{name} has the token id {largest}, where the tokenizer has ids up to {self.vocab_size - 1}: it was "
                "made with another one"
            )
        if self.following:
            threading.Thread(target=_try_to_download, args=[self.following], daemon=True).start()
        return rows


def _try_to_download(file: HubTokenFile) -> None:
    with contextlib.suppress(UserError):  # it fails once more where the file is needed, and is reported there
        download(file)


def list_token_files(repo_id: str, revision: str | None) -> dict[str, list[HubTokenFile]]:
    """
    Return the token files in the main folder of a dataset on the Hub by split, in the order of their names; none if it
    has other files, or is a packed dataset.

    Raises:
        Exception: of huggingface_hub, if there is no such dataset, or the Hub cannot be reached.
    """
    commit = HfApi().dataset_info(repo_id, revision=revision).sha
    found: dict[str, list[HubTokenFile]] = {"train": [], "validation": []}
    for entry in HfApi().list_repo_tree(repo_id, repo_type="dataset", revision=commit):
        if entry.path == DATASET_FILE:
            return {split: [] for split in found}
        split = split_of(PurePosixPath(entry.path))
        if isinstance(entry, RepoFile) and split:
            sha256 = entry.lfs.sha256 if entry.lfs else None
            found[split].append(HubTokenFile(repo_id, str(commit), entry.path, entry.size, entry.blob_id, sha256))
    return {split: sorted(files, key=lambda file: file.name) for split, files in found.items()}


def open_hub_token_files(
    files: dict[str, list[HubTokenFile]], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> DataFolder:
    """
    Open the token files of a dataset on the Hub. Those for validation are downloaded, if they are not there yet.

    Raises:
        UserError: if one of them cannot be downloaded or is not what it should be, or a split has no files.
    """
    repo_id, revision = next((file.repo_id, file.revision) for split in files.values() for file in split)
    for split, word in (("train", "train"), ("validation", "val")):
        if not files[split]:
            raise UserError(f"--dataset_name {repo_id} has no .npy or .bin file with '{word}' in its name")
    sizes = bytes_of_tokens(tokenizer)
    if sizes is None:
        raise UserError(
            f"{repo_id} holds token files, which need a byte-level BPE such as GPT-2's as --tokenizer_name"
        )
    paths = [download(file) for file in files["validation"]]
    validation = token_dataset([open_token_file(path, block_size, overlap=True) for path in paths], block_size)

    # All files of a dataset begin with as many bytes that are not tokens: a header, or none.
    header = files["validation"][0].size - 2 * len(open_tokens(paths[0]))
    parts = []
    for file, following in zip(files["train"], [*files["train"][1:], None], strict=True):
        num_rows = (file.size - header) // 2 // block_size
        if num_rows < 1:
            raise UserError(f"{repo_id}: {file.name} is less than one row of --block_size {block_size}")
        parts.append(HubRows(file, num_rows, block_size, following, len(sizes)))

    listing = "".join(
        f"{file.name} {file.size} {file.sha256 or file.blob_id} {block_size}\n" for file in files["train"]
    )
    return DataFolder(
        name=repo_id,
        revision=revision,
        block_size=block_size,
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
        check=lambda: count(validation, paths, tokenizer, sizes),
        train=token_dataset(parts, block_size),
        validation=validation,
        file_by_file=True,
    )
