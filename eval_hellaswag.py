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
import sys
from dataclasses import dataclass
from pathlib import Path

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.evaluation.hellaswag_items import (
    HELLASWAG,
    MAX_PROBLEMS,
    EncodedItem,
    Protocol,
    encode_items,
    hellaswag_source,
    load_hub_items,
    load_items,
    window_of,
)
from pretraining.evaluation.hellaswag_scoring import load_metric, score_on_all_processes, summarise
from pretraining.evaluation.script import AmountFlags, ResultFlags, open_accelerator
from pretraining.model_flags import LoadedModelFlags
from pretraining.publishing.card_edits import update_model_card
from pretraining.records.task_results import task_results
from pretraining.training.model import load_from_flags


@dataclass
class ItemFlags:
    _argument_group_name = "items"

    data_file: str | None = flag(None, "items in HellaSwag's own format, a JSON object a line")
    dataset_name: str | None = flag(None, f"a dataset on the Hub to use instead; without either it is {HELLASWAG}")
    protocol: Protocol = flag("completion", "how the texts are put together and the likelihoods compared")


@dataclass
class HellaSwagArguments(ResultFlags, ItemFlags, AmountFlags, LoadedModelFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = self.problems_of_model() + self.problems_of_amount()
        if self.data_file and self.dataset_name:
            found.append("--data_file and --dataset_name are two sources: give one of them")
        return found + self.problems_of_results(self, self.limit)

    def source(self) -> str:
        return self.data_file or self.dataset_name or HELLASWAG


def main() -> None:
    args = parse_arguments(HellaSwagArguments, __doc__)
    accelerator = open_accelerator()
    if accelerator.is_main_process:
        load_metric()

    # By all processes at once: downloads are locked, and of a mistake each can say what it is before it ends.
    if args.data_file:
        items, revision = load_items(args.data_file, args.limit), None
    else:
        items, revision = load_hub_items(args.source(), args.limit)
    model, tokenizer = load_from_flags(args)
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
        write_results(args, encoded, scores, revision)
    accelerator.end_training()


def write_results(
    args: HellaSwagArguments, items: list[EncodedItem], scores: list[dict], revision: str | None
) -> None:
    summary = summarise(items, scores, args.protocol)
    result = json.dumps({**summary, "model": args.model_name_or_path}, indent=2)
    print(result)
    args.write(result + "\n", "".join(json.dumps(score) + "\n" for score in scores))
    if args.update_model_card:
        dataset = Path(args.data_file).name if args.data_file else args.source()
        source = hellaswag_source(dataset, revision, len(items), args.protocol, is_whole=True)
        metrics = {f"hellaswag_{key}": value for key, value in summary.items() if key.startswith("acc")}
        update_model_card(args.model_name_or_path, task_results([source], metrics))


if __name__ == "__main__":
    run_script(main)
