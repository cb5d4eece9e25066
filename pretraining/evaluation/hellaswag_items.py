"""HellaSwag's items, from a file or the Hub, and what a model is to score of each by one of the two protocols."""

import itertools
import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pretraining.errors import UserError, one_line
from pretraining.evaluation.loglikelihood import Continuation
from pretraining.records.task_results import TaskSource, commit_of

Protocol = Literal["completion", "lm_eval"]

HELLASWAG = "Rowan/hellaswag"
HUB_SPLIT = "validation"  # the test split's labels were never published
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
FIELDS = ("ind", *TEXT_FIELDS, "endings", "label")
MAX_PROBLEMS = 10  # shown; in a file of another kind every line is wrong


def load_items(path: str | Path, limit: int | None = None) -> list[dict]:
    """
    Items of a JSON-lines file: `ind`, `activity_label`, `ctx_a`, `ctx_b`, `ctx`, `endings` (4 texts) and `label` (0 to
    3, as a number or in quotes). Other fields are left out, empty lines skipped, items after the first `limit` unread.

    Raises:
        UserError: if the file cannot be read or holds no items; for malformed items, a line each.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    records = ((f"{path} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return check_items(str(path), itertools.islice(records, limit))


def load_hub_items(
    name: str = HELLASWAG,
    limit: int | None = None,
    file_flag: str = "--data_file",
    tasks_flag: str = "eval_harness.py --tasks",
) -> tuple[list[dict], str | None]:
    """
    Return the items of a dataset on the Hub, and its commit.

    Args:
        limit: see `load_items`.
        file_flag, tasks_flag: what takes items of a file and other tasks, for the message.

    Raises:
        UserError: if the dataset cannot be loaded; for malformed items, a line each.
    """
    from datasets import load_dataset  # only here: items in a file need no datasets library

    try:
        dataset = load_dataset(name, split=HUB_SPLIT)
    except Exception as error:  # datasets has many kinds
        raise UserError(
            f"the dataset {name} cannot be loaded: {one_line(error)} (items from elsewhere: {file_flag}; other tasks "
            f"that tell small models apart: {tasks_flag} lambada_openai piqa arc_easy)"
        ) from None
    records = ((f"{name} item {index}", record) for index, record in enumerate(dataset))
    return check_items(name, itertools.islice(records, limit)), commit_of(dataset)


def hellaswag_source(
    dataset: str, revision: str | None, num_items: int, protocol: Protocol, is_whole: bool
) -> TaskSource:
    """Describe items for the results on them. Args: see `TaskSource`."""
    return TaskSource(
        task="hellaswag",
        title="HellaSwag" if dataset == HELLASWAG else dataset,
        dataset=dataset,
        config=None,
        split=HUB_SPLIT if "/" in dataset else None,
        revision=revision,
        num_items=num_items,
        is_whole=is_whole,
        setting=f"{protocol} protocol",
        details={"protocol": protocol},
    )


def check_items(source: str, records: Iterable[tuple[str, str | dict]]) -> list[dict]:
    """The items of (place, record) pairs; a place is for messages, a record an object or its JSON text."""
    items, problems = [], []
    for place, record in records:
        try:
            items.append(to_item(record))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"{source}: {len(problems) - MAX_PROBLEMS} more items are malformed"]
    if problems:
        raise UserError(*problems)
    if not items:
        raise UserError(f"{source} holds no items")
    return items


def to_item(record: str | dict) -> dict:
    """An item's fields, `ind` and `label` as numbers. ValueError if one is missing or wrong."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON, {error.msg} at character {error.pos + 1}") from None
        except RecursionError:
            raise ValueError("not valid JSON, nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"an item must be a JSON object, got {reprlib.repr(record)}")
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(f"no {', '.join(missing)}")

    def require(fine: bool, name: str, meaning: str, value: object) -> None:
        if not fine:
            raise ValueError(f"{name} must be {meaning}, got {reprlib.repr(value)}")

    item = {name: record[name] for name in FIELDS}
    endings = item["endings"]
    require(isinstance(endings, list) and len(endings) == 4, "endings", "a list of 4 texts", endings)
    for name in TEXT_FIELDS:
        require(isinstance(item[name], str), name, "a text", item[name])
    for name, text in [("ctx", item["ctx"]), *((f"ending {number}", text) for number, text in enumerate(endings))]:
        require(isinstance(text, str) and clean(text).strip() != "", name, "a text that is not empty", text)
    for name, text in [(name, item[name]) for name in TEXT_FIELDS] + [("ending", text) for text in endings]:
        require(not re.search("[\ud800-\udfff]", text), name, "Unicode without lone surrogates", text)
    for name, pattern, meaning in (("label", "[0-3]", "0, 1, 2 or 3"), ("ind", "[0-9]+", "a whole number")):
        require(re.fullmatch(pattern, str(item[name])) is not None, name, meaning, item[name])
        item[name] = int(item[name])
    return item


class EncodedItem(NamedTuple):
    """
    Attributes:
        endings: each behind its context, in tokens.
        lengths: of the endings, for acc_norm: in tokens (completion) or in characters (lm_eval).
        is_cut: whether one of them was too long for the model.
    """

    ind: int
    label: int
    endings: list[Continuation]
    lengths: list[int]
    is_cut: bool

    def longest(self) -> int:
        """Of the longest ending with its context, in tokens."""
        return max(len(ending.token_ids) for ending in self.endings)


def encode_items(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, items: list[dict], protocol: Protocol
) -> list[EncodedItem]:
    """
    Items, as `load_items` returns them, for a model of this config.

    Raises:
        UserError: for an item that the tokenizer or the model cannot handle.
    """
    return [encode_item(config, tokenizer, item, protocol) for item in items]


def encode_item(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, item: dict, protocol: Protocol
) -> EncodedItem:
    """
    Of an ending too long for the model, with its context, the last n_positions + 1 tokens are kept, of which the last
    is only predicted: as in lm-evaluation-harness, the text is cut on its left.
    """
    window, vocab_size = window_of(config), config.get_text_config().vocab_size
    context, endings = (encode_completion if protocol == "completion" else encode_lm_eval)(tokenizer, item)
    if not context or not all(endings):
        raise UserError(f"item {item['ind']}: its context or one of its endings has no tokens")
    if (largest := max(map(max, [context, *endings]))) >= vocab_size:
        raise UserError(f"the tokenizer gave token {largest}, the model has only {vocab_size}")
    whole = [context + ending for ending in endings]
    kept = [token_ids[-(window + 1) if window else None :] for token_ids in whole]
    num_scored = [min(len(ending), len(token_ids) - 1) for ending, token_ids in zip(endings, kept, strict=True)]
    num_characters = [len(clean(ending)) for ending in item["endings"]]
    return EncodedItem(
        item["ind"],
        item["label"],
        [Continuation(*pair) for pair in zip(kept, num_scored, strict=True)],
        num_scored if protocol == "completion" else num_characters,
        is_cut=kept != whole,
    )


def window_of(config: PreTrainedConfig) -> int | None:
    """How many positions the model has, if that is limited."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def encode_completion(tokenizer: PreTrainedTokenizerBase, item: dict) -> tuple[list[int], list[list[int]]]:
    """The tokens of the context, and of each ending."""
    (context,) = tokenizer([item["ctx"]], verbose=False)["input_ids"]  # with a begin-of-text token, if it has one
    endings = [" " + ending for ending in item["endings"]]
    return context, tokenizer(endings, add_special_tokens=False, verbose=False)["input_ids"]


def encode_lm_eval(tokenizer: PreTrainedTokenizerBase, item: dict) -> tuple[list[int], list[list[int]]]:
    """The same, encoded whole and then split; spaces that end the context go with the ending, as BPE joins them."""
    text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    wholes = [f"{text} {clean(ending)}" for ending in item["endings"]]
    context, *wholes = tokenizer([text.rstrip(), *wholes], verbose=False)["input_ids"]
    return context, [whole[len(context) :] for whole in wholes]


def clean(text: str) -> str:
    """lm-evaluation-harness's way to take out the marks, such as "[header]", that items from WikiHow carry."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
