"""
What a run trains on, from the sources that its flags name to micro-batches. Here of packed rows, our own and borrowed
ones; streams, which need `datasets`, are in streaming.py.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pretraining.data.data_folder import DATASET_FILE, DataFolder, open_data_folder, read_data_folder
from pretraining.data.hub_token_files import HubTokenFile, list_token_files, open_hub_token_files
from pretraining.data.packed_rows import PackedDataset, concatenate, training_batches
from pretraining.data.row_order import RowOrder, StepSplit
from pretraining.data.token_files import open_borrowed_folder, token_files
from pretraining.distributed.processes import on_every_process
from pretraining.errors import ProcessError, UserError, one_line
from pretraining.text.sources import Source
from pretraining.tokenization.tokenizer import load_tokenizer, tokenizer_fingerprint

GPT2 = "openai-community/gpt2"  # whose tokens the token files of other projects have
# A data folder or a folder of token files, or the token files of a dataset on the Hub by split.
Place = Path | dict[str, list[HubTokenFile]]
DEFAULT_BLOCK_SIZE = 1024  # where neither the data nor a flag says: GPT-2's


class Batches(Protocol):
    """Micro-batches (batch_size, block_size) of one process, endless."""

    def __next__(self) -> torch.Tensor: ...

    def position(self) -> dict | None:
        """Behind the last one that was taken, as JSON; None where step and seed say all."""


class PackedBatches:
    def __init__(self, loader: DataLoader):
        self._batches = iter(loader)

    def __next__(self) -> torch.Tensor:
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise ProcessError(*batch.problems)
        return batch

    def position(self) -> None:
        return None


@dataclass
class TrainingData:
    """
    Attributes:
        sources: name, configuration, revision and share of each, for the model card.
        fingerprint: sha256 of what a checkpoint's position depends on.
        statistics: of one epoch of the training rows, as in `PackedDataset`; of a stream nobody knows them.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    validation: PackedDataset
    sources: list[dict]
    fingerprint: str
    statistics: dict | None = None

    @property
    def name(self) -> str:
        """What the sources are, in a line."""
        return ", ".join(f"{source['name']} (revision {source['revision']})" for source in self.sources)

    def binding(self, split: StepSplit) -> dict:
        """What has to be the same for a checkpoint's position to mean the same, beyond the global batch."""
        return {}

    def batches(self, split: StepSplit, seed: int, first_step: int, position: dict | None) -> Batches:
        """
        Those from `first_step` on.

        Args:
            position: what their `position()` gave when the checkpoint was made, if it has one.
        """
        raise NotImplementedError

    def row_numbers(self, split: StepSplit, seed: int, step: int, micro_step: int) -> list[int] | None:
        """Which rows a micro-batch of one process has; None for a stream, whose rows have no numbers."""
        return None


@dataclass
class PackedData(TrainingData):
    folders: list[DataFolder] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def batches(self, split: StepSplit, seed: int, first_step: int, position: dict | None) -> Batches:
        rows = concatenate([folder.train for folder in self.folders])
        return PackedBatches(training_batches(rows, self._order(split, seed, first_step), split.num_workers))

    def row_numbers(self, split: StepSplit, seed: int, step: int, micro_step: int) -> list[int]:
        return self._order(split, seed).rows(step, micro_step)

    def _order(self, split: StepSplit, seed: int, first_step: int = 0) -> RowOrder:
        return RowOrder(
            num_rows=[
                [len(part) for part in folder.train.parts] if folder.file_by_file else len(folder.train)
                for folder in self.folders
            ],
            batch_size=split.batch_size,
            gradient_accumulation_steps=split.gradient_accumulation_steps,
            num_processes=split.num_processes,
            process_index=split.process_index,
            seed=seed,
            first_step=first_step,
            weights=self.weights,
        )


def open_packed(
    sources: list[Source], tokenizer_name: str | None, block_size: int | None, state: PartialState
) -> PackedData:
    """
    Data folders, packed datasets on the Hub and folders of other projects' token files, in any mixture. Each file is
    read once by one process of each machine, to check it.

    Args:
        tokenizer_name: needed for token files of other projects, which come without; otherwise it has to be the one
            that the data was made with.

    Raises:
        UserError: on all processes, with everything that is wrong with the files or does not fit together.
    """
    places = [Path(source.data_dir) if source.data_dir else download(source, state) for source in sources]
    tokenizer, block_size, folders = on_every_process(lambda: _open_folders(places, tokenizer_name, block_size))
    _check_once_a_machine(folders, state)
    weights = [source.weight for source in sources]
    identity = folders[0].fingerprint
    if len(folders) > 1:
        identity = digest([[folder.fingerprint, weight] for folder, weight in zip(folders, weights, strict=True)])
    return PackedData(
        tokenizer=tokenizer,
        block_size=block_size,
        validation=concatenate([folder.validation for folder in folders]),
        sources=with_shares(
            [{"name": each.name, "config": each.config, "revision": each.revision} for each in folders], weights
        ),
        fingerprint=identity,
        statistics=concatenate([folder.train for folder in folders]).statistics,
        folders=folders,
        weights=weights,
    )


def _is_borrowed(place: Place) -> bool:
    if isinstance(place, dict):
        return True
    return not (place / DATASET_FILE).is_file() and any(token_files(place).values())


def _open_folders(
    places: list[Place], tokenizer_name: str | None, block_size: int | None
) -> tuple[PreTrainedTokenizerBase, int, list[DataFolder]]:
    """Return the tokenizer and the block size of all folders, and the folders."""
    own = next((place for place in places if isinstance(place, Path) and not _is_borrowed(place)), None)
    if all(isinstance(place, dict) for place in places):
        tokenizer_name = tokenizer_name or GPT2
    if own is not None:
        block_size = block_size or read_data_folder(own)["block_size"]
        tokenizer = load_tokenizer(tokenizer_name or own / "tokenizer")
    elif tokenizer_name:
        block_size = block_size or DEFAULT_BLOCK_SIZE
        tokenizer = load_tokenizer(tokenizer_name)
    else:
        local = next(place for place in places if isinstance(place, Path))
        raise UserError(f"{local} holds token files without a tokenizer: --tokenizer_name {GPT2} ?")
    fingerprint = tokenizer_fingerprint(tokenizer)
    folders, problems = [], []
    for place in places:
        try:
            if isinstance(place, dict):
                folders.append(open_hub_token_files(place, tokenizer, block_size))
                continue
            if _is_borrowed(place):
                folders.append(open_borrowed_folder(place, tokenizer, block_size))
                continue
            folder = open_data_folder(place, fingerprint)
            folders.append(folder)
            if folder.block_size != block_size:
                problems.append(
                    f"--block_size {block_size}, but the rows of {place} have {folder.block_size} tokens: prepare the "
                    "data again with that block size"
                )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return tokenizer, block_size, folders


def download(source: Source, state: PartialState) -> Place:
    """
    Download a packed dataset that `prepare_data.py --push_to_hub` published, by one process of each machine; or find
    the token files of a dataset, which are downloaded when they are needed.

    Raises:
        UserError: if there is no dataset of that name, or it has neither.
    """
    name, problem, found = str(source.dataset_name), None, None
    if state.is_local_main_process:
        try:
            found = _find_token_files(source) or _download_packed(source)
        except UserError as error:
            problem = error.problems[0]
        except Exception as error:  # no such dataset or revision, no network, a full disk
            problem = (
                f"--dataset_name {name} cannot be downloaded as packed data: {one_line(error)} (text that is not "
                "packed needs --streaming, or prepare_data.py)"
            )
    answers = gather_object([(problem, found)])
    problems = list(dict.fromkeys(problem for problem, _ in answers if problem))
    if problems:
        raise UserError(*problems)
    found = answers[0][1]
    if isinstance(found, dict):
        return found
    return Path(snapshot_download(name, repo_type="dataset", revision=found, local_files_only=True))


def _find_token_files(source: Source) -> dict[str, list[HubTokenFile]] | None:
    """Return the token files of a dataset by split, None if it has none."""
    files = list_token_files(str(source.dataset_name), source.dataset_revision)
    if not any(files.values()):
        return None
    if source.dataset_config_name:
        raise UserError(f"{source.dataset_name} holds token files, which have no --dataset_config_name: leave it out")
    return {**files, "train": files["train"][: source.max_train_files]}


def _download_packed(source: Source) -> str:
    """Download a packed dataset. Returns its commit."""
    name = str(source.dataset_name)
    if source.max_train_files:
        raise UserError(f"--max_train_files is for datasets of token files, and {name} has none")
    revision = str(HfApi().dataset_info(name, revision=source.dataset_revision).sha)
    hf_hub_download(name, DATASET_FILE, repo_type="dataset", revision=revision)  # before anything large
    snapshot_download(name, repo_type="dataset", revision=revision)
    return revision


def _check_once_a_machine(folders: list[DataFolder], state: PartialState) -> None:
    """Have one process of each machine read all files, and all processes know what it found."""
    finding = None
    if state.is_local_main_process:
        problems = [problem for folder in folders for problem in folder.check()]
        finding = problems, [(folder.train.statistics, folder.validation.statistics) for folder in folders]
    findings = [each for each in gather_object([finding]) if each]
    if problems := [problem for found, _ in findings for problem in found]:
        raise UserError(*dict.fromkeys(problems))
    for folder, (train, validation) in zip(folders, findings[0][1], strict=True):
        folder.train.statistics, folder.validation.statistics = train, validation


def with_shares(descriptions: list[dict], weights: list[float]) -> list[dict]:
    """Descriptions of sources with the share of the rows that each gets."""
    shares = [weight / sum(weights) for weight in weights]
    return [{**description, "share": share} for description, share in zip(descriptions, shares, strict=True)]


def digest(value: object) -> str:
    """sha256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
