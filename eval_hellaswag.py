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

import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining import hardware
from pretraining.arguments import (
    ProcessError,
    UserError,
    flag,
    one_line,
    parse_arguments,
    problems_of_range,
    run_script,
)
from pretraining.card_edits import update_model_card
from pretraining.files import write_text
from pretraining.hellaswag_items import (
    HUB_SPLIT,
    MAX_PROBLEMS,
    EncodedItem,
    Protocol,
    encode_items,
    load_hub_items,
    load_items,
    window_of,
)
from pretraining.hub import check_name
from pretraining.launch import check_launch, open_state
from pretraining.launcher import told_precision
from pretraining.loglikelihood import loglikelihoods, takes_trees, token_tree
from pretraining.model_card import CARD, HELLASWAG, hellaswag_results

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRIC = Path(__file__).resolve().parent / "metrics" / "hellaswag"


@dataclass
class ScoringFlags:
    _argument_group_name = "model and items"

    model_name_or_path: str = flag(None, "the model, with its tokenizer: a folder, or a name on the Hub (required)")
    model_revision: str | None = flag(None, "branch, tag or commit of a model on the Hub")
    trust_remote_code: bool = flag(False, "run the modeling code that comes with the model; read it first")
    data_file: str | None = flag(None, "items in HellaSwag's own format, a JSON object a line")
    dataset_name: str | None = flag(None, f"a dataset on the Hub to use instead; without either it is {HELLASWAG}")
    protocol: Protocol = flag("completion", "how the texts are put together and the likelihoods compared")
    limit: int | None = flag(None, "score only the first so many items")
    per_device_eval_batch_size: int = flag(8, "items scored at once")


@dataclass
class ResultFlags:
    _argument_group_name = "results"

    output_file: str | None = flag(None, "a JSON file to write the result to")
    predictions_file: str | None = flag(None, "a JSON-lines file to write the scores of every item to")
    update_model_card: bool = flag(
        False, "put the result into the model's card, README.md in its folder or on the Hub"
    )


@dataclass
class HellaSwagArguments(ResultFlags, ScoringFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = []
        if not self.model_name_or_path:
            found.append("--model_name_or_path is required: a folder, or a name on the Hub")
        if self.data_file and self.dataset_name:
            found.append("--data_file and --dataset_name are two sources: give one of them")
        found += problems_of_range(self, ["per_device_eval_batch_size", "limit"], 1)
        # What can be known now, not after an hour of scoring.
        for name in ("output_file", "predictions_file"):
            if (value := getattr(self, name)) and (problem := unwritable(Path(value))):
                found.append(f"--{name} {value} {problem}")
        if self.output_file and self.predictions_file and Path(self.output_file) == Path(self.predictions_file):
            found.append(f"--output_file and --predictions_file are the same file, {self.output_file}")
        if self.update_model_card and self.limit:
            found.append("--update_model_card is for a result of all items, not for a --limit")
        is_folder = bool(self.model_name_or_path) and Path(self.model_name_or_path).is_dir()
        if is_folder and self.model_revision:
            found.append(f"--model_revision is for a model on the Hub, {self.model_name_or_path} is a folder")
        elif self.update_model_card and self.model_revision:
            found.append("--update_model_card is for the newest revision of a model, not for a --model_revision")
        if self.update_model_card and is_folder and not (Path(self.model_name_or_path) / CARD).is_file():
            found.append(f"--update_model_card: {self.model_name_or_path} has no {CARD}")
        return found

    def source(self) -> str:
        return self.data_file or self.dataset_name or HELLASWAG


def main() -> None:
    args = parse_arguments(HellaSwagArguments, __doc__)
    state = open_state()
    check_launch(state.num_processes)
    if state.device.type == "cpu":
        hardware.keep_freed_memory()
    # In fp32 unless told otherwise, as the scores that are published.
    accelerator = Accelerator(cpu=state.device.type == "cpu", mixed_precision=told_precision() or "no")
    if accelerator.is_main_process:
        load_metric()

    # By all processes at once: downloads are locked, and of a mistake each can say what it is before it ends.
    load = load_items if args.data_file else load_hub_items
    items = load(args.source(), args.limit)
    model, tokenizer = load_model(args.model_name_or_path, args.model_revision or "main", args.trust_remote_code)
    model.to(accelerator.device)
    encoded = encode_items(model.config, tokenizer, items, args.protocol)
    if accelerator.is_main_process and (cut := [item.ind for item in encoded if item.is_cut]):
        print(
            f"{len(cut):,} of {len(items):,} items are longer than the model's {window_of(model.config):,} positions "
            f"and lose the beginning of their context: {', '.join(map(str, cut[:MAX_PROBLEMS]))}"
            f"{', ...' if len(cut) > MAX_PROBLEMS else ''}",
            file=sys.stderr,
        )
    with accelerator.autocast():  # what the launch config says; around all, as it keeps the weights that it has cast
        scores = score_on_all_processes(accelerator, model, encoded, args.per_device_eval_batch_size, progress=True)
    if accelerator.is_main_process:
        write_results(args, encoded, scores)
    accelerator.end_training()


def write_results(args: HellaSwagArguments, items: list[EncodedItem], scores: list[dict]) -> None:
    summary = summarise(items, scores, args.protocol)
    result = json.dumps({**summary, "model": args.model_name_or_path}, indent=2)
    print(result)
    lines = "".join(json.dumps(score) + "\n" for score in scores)
    problems = []
    for path, content in ((args.predictions_file, lines), (args.output_file, result + "\n")):
        try:
            if path:
                write_text(Path(path), content)
        except OSError as error:
            problems.append(f"{path} cannot be written: {error.strerror}")
    if problems:
        raise UserError(*problems)
    if args.update_model_card:
        data = (Path(args.data_file).name, None) if args.data_file else (args.source(), HUB_SPLIT)
        update_model_card(args.model_name_or_path, hellaswag_results(summary, *data))


def unwritable(path: Path) -> str | None:
    """What keeps a file from being written, as far as it can be seen."""
    if os.path.isdir(path):  # which a name that is too long is no error for
        return "is a folder: give the name of a file"
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        return f"cannot be written: {parent} is not a folder"
    return None if os.access(parent, os.W_OK) else f"cannot be written: no permission to write in {parent}"


def score_on_all_processes(
    accelerator: Accelerator,
    model: PreTrainedModel,
    items: list[EncodedItem],
    batch_size: int,
    progress: bool = False,
) -> list[dict]:
    """
    `score_items` with the work shared out. Every process calls it with all items, and with the model as
    `accelerator.unwrap_model` gives it, and gets the scores of all items, in their order.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    # Shares of one size, filled up with the last item: a sharded model's forward pass is an exchange between the
    # processes, which all have to call it equally often, and for the same reason all with trees or none.
    share = range(rank, math.ceil(len(items) / num_processes) * num_processes, num_processes)
    own_items = [items[min(index, len(items) - 1)] for index in share]
    as_trees = all(gather_object([can_be_trees(model, own_items)]))
    if progress and not as_trees and accelerator.is_main_process:
        print("this model does not see trees of tokens as it should: each ending is scored by itself", file=sys.stderr)
    scores = score_items(model, own_items, batch_size, as_trees, progress and accelerator.is_main_process)
    shares = gather_object([scores])
    return [shares[index % num_processes][index // num_processes] for index in range(len(items))]


def can_be_trees(model: PreTrainedModel, items: list[EncodedItem]) -> bool:
    """Whether the model scores an item's four endings rightly, and so faster, as one tree of tokens."""
    with evaluating(model):
        largest = max(items, key=lambda item: len(token_tree(item.endings)))
        try:
            return takes_trees(model, [max(items, key=EncodedItem.longest).endings, largest.endings])
        except ValueError as error:
            raise UserError(str(error)) from None


def score_items(
    model: PreTrainedModel, items: list[EncodedItem], batch_size: int, as_trees: bool, progress: bool = False
) -> list[dict]:
    """
    Score items on this process.

    Args:
        model: a causal language model of transformers, on its device.
        items: as `encode_items` returns them.
        batch_size: items in a forward pass.
        as_trees: see `can_be_trees`.
        progress: show a bar, with the accuracies so far.

    Returns:
        For each item, in order: `ind`, `label`, `loglikelihoods` (of the four endings, in nats), `pred`, `pred_norm`.

    Raises:
        ProcessError: if the model's log-likelihoods are not finite.
    """
    # Like sizes together need little padding; the largest first, so that memory runs out at once or never.
    sizes = [len(token_tree(item.endings)) if as_trees else item.longest() for item in items]
    order = sorted(range(len(items)), key=lambda index: -sizes[index])
    scores: dict[int, dict] = {}
    hits: Counter[str] = Counter()
    bar = tqdm(total=len(items), desc="HellaSwag", unit="item", disable=not progress)
    with evaluating(model), bar:
        for start in range(0, len(items), batch_size):
            batch = order[start : start + batch_size]
            sums = loglikelihoods(model, [items[index].endings for index in batch], as_trees)
            for index, of_item in zip(batch, sums, strict=True):
                scores[index] = score = to_score(items[index], of_item)
                hits["acc"] += score["pred"] == score["label"]
                hits["acc_norm"] += score["pred_norm"] == score["label"]
            bar.set_postfix({name: f"{count / len(scores):.4f}" for name, count in hits.items()}, refresh=False)
            bar.update(len(batch))
    return [scores[index] for index in range(len(items))]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def summarise(items: list[EncodedItem], scores: list[dict], protocol: Protocol) -> dict:
    """
    `protocol n acc acc_stderr acc_norm acc_norm_stderr` of what `score_items` returned, by metrics/hellaswag.
    Accuracies are fractions.
    """
    result = load_metric().compute(
        predictions=[score["loglikelihoods"] for score in scores],
        lengths=[item.lengths for item in items],
        references=[score["label"] for score in scores],
    )
    return {"protocol": protocol, "n": len(scores), **result}


@functools.cache
def load_metric() -> "EvaluationModule":
    """The metric in metrics/hellaswag."""
    import evaluate  # only here: with datasets and pandas, it takes a second or two

    try:
        return evaluate.load(str(METRIC), keep_in_memory=True)
    except OSError as error:
        raise UserError(f"{METRIC} cannot be loaded: {one_line(error)}") from None


def to_score(item: EncodedItem, sums: list[float]) -> dict:
    """An item's line of --predictions_file. Of equal endings the first one is predicted."""
    if not all(map(math.isfinite, sums)):
        raise ProcessError(f"item {item.ind}: the model's log-likelihoods are {sums}, its weights are not usable")
    means = [total / length for total, length in zip(sums, item.lengths, strict=True)]
    pred, pred_norm = sums.index(max(sums)), means.index(max(means))
    return {"ind": item.ind, "label": item.label, "loglikelihoods": sums, "pred": pred, "pred_norm": pred_norm}


def load_model(
    name_or_path: str, revision: str = "main", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of any type, in eval mode, and its tokenizer."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        check_name(name_or_path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, RuntimeError, ImportError, StrictDataclassError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model_name_or_path {name_or_path} comes with code of its own: read it, and if it may run here, "
                "give --trust_remote_code"
            ) from None
        kind = "" if Path(name_or_path).is_dir() else "is not a folder, and "
        raise UserError(f"--model_name_or_path {name_or_path} {kind}cannot be loaded: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):  # transformers leaves them at random and only warns
        raise UserError(f"--model_name_or_path {name_or_path} lacks {len(missing)} weights, such as {missing[0]}")
    return model, tokenizer


if __name__ == "__main__":
    run_script(main)
