"""
The stock GPT-2 form of a published model, on a branch of its repository: transformers, vLLM and llama.cpp's converter
load it without remote code.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoFile
from transformers import PreTrainedConfig

from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.checkpoints.folders import STOCK
from pretraining.errors import UserError, one_line
from pretraining.files import INCOMPLETE, sha256_of
from pretraining.publishing.card_edits import converted_card
from pretraining.publishing.formats import write_stock
from pretraining.publishing.model_card import CARD
from pretraining.publishing.usage import STOCK_BRANCH
from pretraining.training.model import load_model_and_tokenizer

GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own, in every branch


def has_stock_form(folder: Path) -> bool:
    """Return True if a folder holds a model of this project, with its weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == GPT2ScratchConfig.model_type and bool(_weights(folder))


@contextlib.contextmanager
def stock_form(folder: Path) -> Iterator[tuple[Path, PreTrainedConfig]]:
    """
    Write the stock form of a folder's model into a folder that is there within the block. Yields that folder, and the
    model's config.

    Raises:
        UserError: if the model or its tokenizer cannot be loaded, or the folder cannot be written.
    """
    can_write = os.access(folder, os.W_OK)
    form = folder / (STOCK + INCOMPLETE) if can_write else Path(tempfile.mkdtemp())
    shutil.rmtree(form, ignore_errors=True)  # of a program that was killed
    try:
        model, tokenizer = load_model_and_tokenizer(GPT2ScratchForCausalLM, str(folder))
        try:
            write_stock(model, tokenizer, form)
        except Exception as error:  # a full disk, of several libraries
            raise UserError(
                f"the stock form of {folder} cannot be written: {one_line(error)} (--stock_branch false leaves it out)"
            ) from error
        yield form, model.config
    finally:
        shutil.rmtree(form, ignore_errors=True)


def push_stock_form(
    form: Path, folder: Path, more_files: list[Path], repo_id: str, card: ModelCard, config: PreTrainedConfig
) -> None:
    """
    Write the branch in one commit.

    Args:
        form: what `stock_form` wrote.
        folder: the model's own.
        more_files: of `folder`, that go with it: plots and results.
        card: of the model's own form.
    """
    api = HfApi()
    files = {path.relative_to(form).as_posix(): path for path in form.rglob("*") if path.is_file()}
    files |= {path.relative_to(folder).as_posix(): path for path in more_files}
    operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    text = str(converted_card(str(card), Path(repo_id), "gpt2", config, revision=STOCK_BRANCH))
    operations.append(CommitOperationAdd(CARD, text.encode()))
    api.create_branch(repo_id, branch=STOCK_BRANCH, exist_ok=True)
    # What a new branch has from main goes. Files that the branch alone has are somebody's own.
    from_main = set(api.list_repo_files(repo_id, revision=STOCK_BRANCH)) & set(api.list_repo_files(repo_id))
    old = sorted(from_main - set(files) - {CARD, GIT_ATTRIBUTES})
    title = _title(_digests(folder))
    api.create_commit(
        repo_id, [*operations, *map(CommitOperationDelete, old)], commit_message=title, revision=STOCK_BRANCH
    )


def is_half_pushed(repo_id: str, folder: Path) -> bool:
    """Return True if the branch has the stock form of a folder's weights, but `main` does not have the weights."""
    api, digests = HfApi(), _digests(folder)
    if STOCK_BRANCH not in {branch.name for branch in api.list_repo_refs(repo_id).branches}:
        return False
    if api.list_repo_commits(repo_id, revision=STOCK_BRANCH)[0].title != _title(digests):
        return False
    files = [info for info in api.get_paths_info(repo_id, list(digests)) if isinstance(info, RepoFile)]
    return {file.path: file.lfs.sha256 for file in files if file.lfs} != digests


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in _weights(folder)}


def _title(digests: dict[str, str]) -> str:
    """Return the title of the branch's commit, which names the weights that it is the stock form of."""
    return f"The stock GPT-2 form of {' '.join(digest[:12] for digest in digests.values())}"
