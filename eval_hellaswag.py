"""
HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings continues a text? Zero-shot, by likelihood.

    python eval_hellaswag.py --model_name_or_path runs/demo --limit 500
    accelerate launch eval_hellaswag.py --model_name_or_path openai-community/gpt2 --protocol lm_eval \\
        --data_file hellaswag_val.jsonl --output_file results.json --predictions_file items.jsonl

Two protocols are in use, and their numbers are not comparable. `completion` is build-nanogpt's: the context as it is,
`acc` by the lowest summed and `acc_norm` by the lowest mean loss over the ending's tokens. `lm_eval` is that of
EleutherAI's lm-evaluation-harness: activity label and cleaned texts, `acc` by the highest log-likelihood and
`acc_norm` by the highest log-likelihood per character of the ending.
"""

import itertools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining.arguments import ProcessError, UserError, flag, one_line, parse_arguments, run_script
from pretraining.files import write_text
from pretraining.launch import check_launch

Protocol = Literal["completion", "lm_eval"]

HUB_DATASET = "Rowan/hellaswag"
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
FIELDS = ("ind", *TEXT_FIELDS, "endings", "label")
MAX_PROBLEMS = 10  # shown; in a file of another kind every line is wrong


@dataclass
class HellaSwagArguments:
    model_name_or_path: str = flag(None, "the model to evaluate, with its tokenizer: a folder, or a name on the Hub")
    data_file: str = flag(None, "items in HellaSwag's own format, a JSON object a line")
    dataset_name: str = flag(None, f"a dataset on the Hub to use instead; without either it is {HUB_DATASET}")
    protocol: Protocol = flag("completion", "how the texts are put together and the likelihoods compared")
    per_device_eval_batch_size: int = flag(8, "items scored at once, four sequences each")
    limit: int = flag(None, "score only the first so many items")
    output_file: str = flag(None, "a JSON file to write the result to")
    predictions_file: str = flag(None, "a JSON-lines file to write the scores of every item to")

    def problems(self) -> list[str]:
        found = []
        if not self.model_name_or_path:
            found.append("--model_name_or_path is required: a folder, or a name on the Hub")
        if self.data_file and self.dataset_name:
            found.append("--data_file and --dataset_name are two sources: give one of them")
        for name in ("per_device_eval_batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} must be at least 1, got {value}")
        for name in ("output_file", "predictions_file"):  # now, not after an hour of scoring
            value = getattr(self, name)
            if value and Path(value).is_dir():
                found.append(f"--{name} {value} is a folder: give the name of a file")
        return found


def main() -> None:
    args = parse_arguments(HellaSwagArguments, __doc__)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    check_launch(accelerator.num_processes)

    # By all processes at once: downloads are locked, and of a mistake each can say what it is before it ends.
    if args.data_file:
        items = load_items(args.data_file, args.limit)
    else:
        items = load_hub_items(args.dataset_name or HUB_DATASET, args.limit)
    model, tokenizer = load_model(args.model_name_or_path)
    model.to(accelerator.device)
    encoded = encode_items(model.config, tokenizer, items, args.protocol)
    scores = score_on_all_processes(accelerator, model, encoded, args.per_device_eval_batch_size, progress=True)

    if accelerator.is_main_process:
        result = json.dumps({**summarise(scores, args.protocol), "model": args.model_name_or_path}, indent=2)
        print(result)
        if args.output_file:
            write_text(Path(args.output_file), result + "\n")
        if args.predictions_file:
            write_text(Path(args.predictions_file), "".join(json.dumps(score) + "\n" for score in scores))
    accelerator.end_training()


def score_on_all_processes(
    accelerator: Accelerator, model, items: list["EncodedItem"], batch_size: int, progress: bool = False
) -> list[dict]:
    """
    `score_items` with the work shared out. Every process calls it with all items, and with the model as
    `accelerator.unwrap_model` gives it, and gets the scores of all items, in their order.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    # Shares of one size, filled up with the last item: a sharded model's forward pass is an exchange between the
    # processes, which all have to call it equally often.
    share = range(rank, math.ceil(len(items) / num_processes) * num_processes, num_processes)
    own_items = [items[min(index, len(items) - 1)] for index in share]
    shares = gather_object([score_items(model, own_items, batch_size, progress and accelerator.is_main_process)])
    return [shares[index % num_processes][index // num_processes] for index in range(len(items))]


def score_items(model, items: list["EncodedItem"], batch_size: int, progress: bool = False) -> list[dict]:
    """
    Score items on this process.

    Args:
        model: a causal language model of transformers, on its device.
        items: as `encode_items` returns them.
        batch_size: items in a forward pass, four sequences each.
        progress: show a bar, with the accuracies so far.

    Returns:
        For each item, in order: `ind`, `label`, `loglikelihoods` (of the four endings, in nats), `pred`, `pred_norm`.

    Raises:
        UserError: if the model's log-likelihoods are not finite.
    """
    # Like lengths together need little padding; the longest first, so that memory runs out at once or never.
    order = sorted(range(len(items)), key=lambda index: -max(len(row.token_ids) for row in items[index].rows))
    scores: dict[int, dict] = {}
    hits = Counter()
    was_training = model.training
    model.eval()
    with tqdm(total=len(items), desc="HellaSwag", unit="item", disable=not progress) as bar:
        for start in range(0, len(items), batch_size):
            batch = order[start : start + batch_size]
            sums = iter(loglikelihoods(model, [row for index in batch for row in items[index].rows]))
            for index in batch:
                scores[index] = score = to_score(items[index], list(itertools.islice(sums, 4)))
                hits["acc"] += score["pred"] == score["label"]
                hits["acc_norm"] += score["pred_norm"] == score["label"]
            bar.set_postfix({name: f"{count / len(scores):.4f}" for name, count in hits.items()}, refresh=False)
            bar.update(len(batch))
    model.train(was_training)
    return [scores[index] for index in range(len(items))]


def summarise(scores: list[dict], protocol: Protocol) -> dict:
    """
    `protocol n acc acc_stderr acc_norm acc_norm_stderr` of what `score_items` returned. Accuracies are fractions;
    their standard errors are sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness has them, and None for one item.
    """
    n = len(scores)
    result = {"protocol": protocol, "n": n}
    for name, prediction in (("acc", "pred"), ("acc_norm", "pred_norm")):
        p = sum(score[prediction] == score["label"] for score in scores) / n
        result |= {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}
    return result


class Row(NamedTuple):
    """One ending behind its context."""

    token_ids: list[int]
    num_scored: int  # the last so many tokens are the ending
    length: int  # of the ending, for acc_norm: in tokens (completion) or in characters (lm_eval)


class EncodedItem(NamedTuple):
    ind: int
    label: int
    rows: list[Row]


def encode_items(config, tokenizer, items: list[dict], protocol: Protocol) -> list[EncodedItem]:
    """
    Items, as `load_items` returns them, for a model of this config.

    Raises:
        UserError: for an item that the tokenizer or the model cannot handle.
    """
    return [EncodedItem(item["ind"], item["label"], encode_item(config, tokenizer, item, protocol)) for item in items]


def encode_item(config, tokenizer, item: dict, protocol: Protocol) -> list[Row]:
    """
    The item's four rows. Of a row too long for the model the last n_positions + 1 tokens are kept, of which the last
    is only predicted: as in lm-evaluation-harness, the text is cut on its left.
    """
    config = config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)

    def encode(*texts: str) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def row(context: list[int], ending: list[int], num_characters: int | None = None) -> Row:
        if not context or not ending:
            raise UserError(f"item {item['ind']}: its context or one of its endings has no tokens")
        token_ids = (context + ending)[-(window + 1) if window else None :]
        if max(token_ids) >= config.vocab_size:
            raise UserError(f"the tokenizer gave token {max(token_ids)}, the model has only {config.vocab_size}")
        num_scored = min(len(ending), len(token_ids) - 1)
        return Row(token_ids, num_scored, num_characters or num_scored)

    if protocol == "completion":
        context, *endings = encode(item["ctx"], *(" " + ending for ending in item["endings"]))
        return [row(context, ending) for ending in endings]

    text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    choices = [clean(ending) for ending in item["endings"]]
    # Encoded whole, then split; spaces that end the context go with the ending, as BPE joins them to the next word.
    context, *wholes = encode(text.rstrip(), *(f"{text} {choice}" for choice in choices))
    return [row(context, whole[len(context) :], len(choice)) for whole, choice in zip(wholes, choices, strict=True)]


def clean(text: str) -> str:
    """lm-evaluation-harness's way to take out the marks, such as "[header]", that items from WikiHow carry."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def loglikelihoods(model, rows: list[Row]) -> list[float]:
    """The summed log-likelihood of each row's ending, in nats."""
    token_ids = [torch.tensor(row.token_ids) for row in rows]
    num_scored = [row.num_scored for row in rows]
    # Padding on the right needs no attention mask: no token sees what comes after it.
    input_ids = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in token_ids], batch_first=True)  # (B, T)
    targets = torch.cat([ids[-n:] for ids, n in zip(token_ids, num_scored, strict=True)])  # (N,): of all endings
    # A token is predicted at the position before it.
    columns = torch.cat([torch.arange(len(ids) - 1)[-n:] for ids, n in zip(token_ids, num_scored, strict=True)])
    positions = (torch.arange(len(rows)).repeat_interleave(torch.tensor(num_scored)), columns)

    # The other logits, most of the memory, are never made: a hook narrows the head's input to the endings. To call
    # base model and head one by one would leave out what some models do to logits (Gemma caps them), and go past the
    # hooks of a sharded model.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions],))  # (B, T, C) -> (N, C)
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits.float()  # (N, vocabulary)
            losses = torch.nn.functional.cross_entropy(logits, targets.to(model.device), reduction="none")
    finally:
        hook.remove()
    return [-part.sum().item() for part in losses.cpu().split(num_scored)]


def to_score(item: EncodedItem, sums: list[float]) -> dict:
    """An item's line of ITEMS.jsonl. Of equal endings the first one is predicted."""
    if not all(map(math.isfinite, sums)):
        raise ProcessError(f"item {item.ind}: the model's log-likelihoods are {sums}, its weights are not usable")
    means = [total / row.length for total, row in zip(sums, item.rows, strict=True)]
    pred, pred_norm = sums.index(max(sums)), means.index(max(means))
    return {"ind": item.ind, "label": item.label, "loglikelihoods": sums, "pred": pred, "pred_norm": pred_norm}


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


def load_hub_items(name: str = HUB_DATASET, limit: int | None = None) -> list[dict]:
    """The validation split of a dataset on the Hub; the test split's labels were never published."""
    from datasets import load_dataset  # only here: items in a file need no datasets library

    try:
        dataset = load_dataset(name, split="validation")
    except (OSError, ValueError) as error:
        raise UserError(f"the dataset {name} cannot be loaded: {one_line(error)}") from None
    records = ((f"{name} item {index}", record) for index, record in enumerate(dataset))
    return check_items(name, itertools.islice(records, limit))


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
    if not isinstance(record, dict):
        raise ValueError(f"an item must be a JSON object, got {reprlib.repr(record)}")
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(f"no {', '.join(missing)}")

    def require(fine: bool, name: str, meaning: str, value) -> None:
        if not fine:
            raise ValueError(f"{name} must be {meaning}, got {reprlib.repr(value)}")

    item = {name: record[name] for name in FIELDS}
    endings = item["endings"]
    require(isinstance(endings, list) and len(endings) == 4, "endings", "a list of 4 texts", endings)
    for name in TEXT_FIELDS:
        require(isinstance(item[name], str), name, "a text", item[name])
    for name, text in [("ctx", item["ctx"]), *((f"ending {number}", text) for number, text in enumerate(endings))]:
        require(isinstance(text, str) and clean(text).strip() != "", name, "a text that is not empty", text)
    for name, pattern, meaning in (("label", "[0-3]", "0, 1, 2 or 3"), ("ind", "[0-9]+", "a whole number")):
        require(re.fullmatch(pattern, str(item[name])) is not None, name, meaning, item[name])
        item[name] = int(item[name])
    return item


def load_model(name_or_path: str) -> tuple:
    """A causal language model of any type, in eval mode, and its tokenizer."""
    try:
        options = {"trust_remote_code": False, "output_loading_info": True}
        model, report = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        kind = "" if Path(name_or_path).is_dir() else "is not a folder, and "
        raise UserError(f"--model_name_or_path {name_or_path} {kind}cannot be loaded: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):  # transformers leaves them at random and only warns
        raise UserError(f"--model_name_or_path {name_or_path} lacks {len(missing)} weights, such as {missing[0]}")
    return model, tokenizer


if __name__ == "__main__":
    run_script(main)
