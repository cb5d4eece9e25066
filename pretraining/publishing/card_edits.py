"""A model card that is there already, changed: for another name, another format, or with new results."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from transformers import PreTrainedConfig

from pretraining.errors import UserError, one_line
from pretraining.files import write_text
from pretraining.publishing.eval_results import card_entries, result_files
from pretraining.publishing.model_card import CARD, USE, title_of
from pretraining.publishing.usage import STOCK_BRANCH, ConvertedFormat, example_prompt, quoted, usage
from pretraining.records.task_results import TaskResult

STRING = r'"(?:[^"\\\n]|\\.)*"'  # between quotes, with escapes
USE_SECTION = re.compile(rf"^{USE}$.*?(?=^## |\Z)", flags=re.M | re.S)  # up to the next heading
NAMES: dict[ConvertedFormat, str] = {"gpt2": "a stock GPT-2", "gguf": "GGUF", "onnx": "ONNX"}
LIBRARY: dict[ConvertedFormat, str] = {"gpt2": "transformers", "gguf": "gguf", "onnx": "onnx"}


def converted_card(
    text: str | None,
    folder: Path,
    format: ConvertedFormat,
    config: PreTrainedConfig,
    outtype: str = "f32",
    license: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """
    The card of a model in another format, made of its own: with an example for that format. All else stays, what
    people wrote there included.

    Args:
        text: of the model's card, None if it has none.
        folder: where the converted model is.
        outtype: the type of its matrices.
        license: of the weights, None to leave it.
        revision: of a repository of this name, where the converted model is.
    """
    card = renamed_card(text, str(folder), license)
    data: Any = card.data
    data.library_name = LIBRARY[format]
    data.pipeline_tag = "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or ["gpt2"]), *([format] if format != "gpt2" else [])]))
    example = usage(format, str(folder), example_prompt(_prompts(card), config), config, revision)
    converted = f"Converted to {NAMES[format]}, in {outtype}. The figures below were measured before that."
    section = f"{USE}\n\n{converted}\n\n{example}\n\n"
    if USE_SECTION.search(card.text):
        card.text = USE_SECTION.sub(lambda _: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    return card


def card_with_stock_branch(card: ModelCard, repo_id: str, config: PreTrainedConfig) -> ModelCard:
    """Return a card that shows, besides, how the model is loaded from the branch with its stock form."""
    if f"revision={quoted(STOCK_BRANCH)}" in card.text:
        return card
    example = usage("gpt2", repo_id, example_prompt(_prompts(card), config), config, STOCK_BRANCH)
    words = (
        f"The branch `{STOCK_BRANCH}` has the same model as a stock GPT-2. It needs no remote code, and is for vLLM, "
        "llama.cpp's converter and other programs that know GPT-2, too:"
    )
    if USE_SECTION.search(card.text):
        card.text = USE_SECTION.sub(lambda use: f"{use[0].rstrip()}\n\n{words}\n\n{example}\n\n", card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n## Without remote code\n\n{words}\n\n{example}\n"
    return card


def _prompts(card: ModelCard) -> list[str]:
    """Return the prompt of the card's example, if it has one."""
    prompt = re.search(rf"generator\(({STRING})", card.text)
    return [json.loads(prompt[1])] if prompt else []


def renamed_card(text: str | None, name: str, license: str | None) -> ModelCard:
    """
    A card for a repository: its title and its examples have the repository's name, in place of the folder's.

    Args:
        text: of the card in the folder that is published, None if there is none.
        name: of the repository: a Hub id, or a folder.
        license: of the weights, None to leave it.

    Raises:
        UserError: if the metadata of the card is not valid.
    """
    title = title_of(name)
    card = _read(text if text is not None else f"# {title}\n")
    data: Any = card.data
    if data.model_name:
        heading = rf"^# {re.escape(data.model_name)}$"
        card.text = re.sub(heading, lambda _: f"# {title}", card.text, count=1, flags=re.M)
        data.model_name = title
    if license:
        card.text = card.text.replace(f"The weights: `{data.license}`.", f"The weights: `{license}`.")
        data.license = license
    use = USE_SECTION.search(card.text)
    if old := re.search(rf"(?:model=|from_pretrained\(|^name = )({STRING})", use[0] if use else card.text, flags=re.M):
        card.text = card.text.replace(old[1], quoted(name))
    return card


def update_model_card(name_or_path: str, results: list[TaskResult]) -> None:
    """
    Put results into the metadata of a model's card, in place of older ones of the same metrics on the same data, and
    into its `.eval_results`: in its folder, or on the Hub in one commit.

    Raises:
        UserError: if the card cannot be read, or written.
    """
    path = Path(name_or_path) / CARD
    is_local = Path(name_or_path).is_dir()
    try:
        card = ModelCard.load(path if is_local else name_or_path)
        card.data.model_name = card.data.model_name or Path(name_or_path).resolve().name
        entries = card_entries(results)
        new = set(map(_subject, entries))
        card.data.eval_results = [old for old in card.data.eval_results or [] if _subject(old) not in new] + entries
        files = {**result_files(results), CARD: str(card)}
        if is_local:
            for name, text in files.items():
                (path.parent / name).parent.mkdir(exist_ok=True)
                write_text(path.parent / name, text)
        else:
            operations = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
            HfApi().create_commit(name_or_path, operations, commit_message="Evaluation results")
    except Exception as error:  # a refused token, no card, metadata that is not valid: of several libraries
        raise UserError(f"--update_model_card: the card of {name_or_path}: {one_line(error)}") from None


def _subject(entry: EvalResult) -> tuple:
    """Return what an entry is about: of two about the same, the newer one is kept."""
    return entry.dataset_type, entry.dataset_config, entry.metric_name, (entry.metric_args or {}).get("task")


def _read(text: str) -> ModelCard:
    if not text.startswith("---"):  # no metadata: what the Hub needs to know at least
        text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2]\n---\n\n{text}"
    try:
        card = ModelCard(text)
        data: Any = card.data
        texts = [data.model_name or "", data.license or "", *(data.tags or [])]
        if wrong := [value for value in texts if not isinstance(value, str)]:
            raise ValueError(f"{wrong[0]!r} where a text is expected")
        str(card)
    except Exception as error:  # whatever somebody wrote there: of YAML and huggingface_hub
        raise UserError(f"{CARD} has metadata that is not valid: {one_line(error)}") from None
    return card
