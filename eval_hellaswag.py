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

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForCausalLM

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, problems_of_range, run_script
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import check_launch, open_state
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_items import (
    HELLASWAG,
    HUB_SPLIT,
    MAX_PROBLEMS,
    EncodedItem,
    Protocol,
    encode_items,
    load_hub_items,
    load_items,
    window_of,
)
from pretraining.evaluation.hellaswag_scoring import load_metric, score_on_all_processes, summarise
from pretraining.files import write_text
from pretraining.publishing.card_edits import update_model_card
from pretraining.publishing.model_card import CARD, hellaswag_results
from pretraining.training.model import load_model_and_tokenizer


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
    model, tokenizer = load_model_and_tokenizer(
        AutoModelForCausalLM,
        args.model_name_or_path,
        revision=args.model_revision or "main",
        trust_remote_code=args.trust_remote_code,
    )
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


if __name__ == "__main__":
    run_script(main)
