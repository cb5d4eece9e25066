"""
Items of HellaSwag scored per second, by eval_hellaswag.py's scorer and by the two programs whose numbers people quote.

    pip install lm-eval
    python benchmarks/hellaswag.py --data_file hellaswag_val.jsonl --tokenizer_name openai-community/gpt2

All score the same items with the same model, of random weights, in turns, in this process, from texts to
log-likelihoods:

    one at a time         an item's four endings in a forward pass, all logits, as build-nanogpt's hellaswag.py does
    completion, lm_eval   the scorer with either protocol, in fp32, and under autocast in the machine's precision
    lm-eval               lm-evaluation-harness's HFLM, with as many sequences at once as the scorer has endings; left
                          out, with the scorer's protocol of that name, where it is not installed

Prints medians over the rounds, how far log-likelihoods are from the scorer's in fp32, and how many of the choices that
acc and acc_norm count (two an item) are others.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.evaluation.hellaswag_items import HELLASWAG, Protocol, encode_items, load_hub_items, load_items
from pretraining.evaluation.hellaswag_scoring import can_be_trees, score_items
from pretraining.markdown import table
from pretraining.tokenization.tokenizer import load_tokenizer

Sums = list[list[float]]  # log-likelihoods of each item's endings


@dataclass
class BenchmarkArguments:
    data_file: str = flag(None, f"items in HellaSwag's own format; {HELLASWAG} on the Hub if left out")
    tokenizer_name: str = flag("openai-community/gpt2", "a tokenizer: a folder, or a name on the Hub")
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    limit: int = flag(200, "so many items, evenly spread over all of them")
    per_device_eval_batch_size: int = flag(8, "items at once")
    mixed_precision: side_by_side.MixedPrecision = flag(None, side_by_side.PRECISION_HELP + "; fp32 is measured too")
    rounds: int = flag(3, "how often")


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    device = side_by_side.device()
    if device.type == "cpu":
        hardware.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(args.config_name)).to(device).eval()
    tokenizer = load_tokenizer(args.tokenizer_name)
    items = load_items(args.data_file) if args.data_file else load_hub_items()[0]
    items = items[:: max(1, len(items) // args.limit)][: args.limit]
    batch_size, mixed_precision = args.per_device_eval_batch_size, side_by_side.precision(args.mixed_precision)
    with_harness = find_spec("lm_eval") is not None
    print(
        side_by_side.section(
            ("torch", "transformers", *(["lm-eval"] if with_harness else [])),
            f"{args.config_name}, {len(items)} items, {batch_size} at once, medians of {args.rounds} rounds",
            compare(model, tokenizer, items, batch_size, mixed_precision, with_harness, args.rounds),
        )
    )


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict],
    batch_size: int,
    mixed_precision: str,
    with_harness: bool,
    rounds: int,
) -> str:
    """Run all programs in turns. Returns a table in Markdown."""
    protocols: dict[Protocol, str] = {"completion": "one at a time"}  # with the program to compare each with
    programs: dict[str, Callable[[], Sums]] = {"one at a time": partial(one_at_a_time, model, tokenizer, items)}
    if with_harness:
        protocols["lm_eval"] = "lm-eval"
        programs["lm-eval"] = harness(model, tokenizer, items, batch_size)
    for protocol in protocols:
        for precision in dict.fromkeys(("no", mixed_precision)):
            name = f"{protocol}, {side_by_side.precision_name(precision)}"
            programs[name] = partial(scorer, model, tokenizer, items, protocol, batch_size, precision)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    sums: dict[str, Sums] = {}

    def run(name: str) -> None:
        sums[name] = programs[name]()

    for _ in range(rounds):
        for name in programs:
            seconds[name].append(side_by_side.seconds(partial(run, name)))

    rows: list[list[object]] = []
    for protocol, other in protocols.items():
        lengths = [item.lengths for item in encode_items(model.config, tokenizer, items, protocol)]
        reference = sums[f"{protocol}, fp32"]
        for name in programs:
            if name != other and not name.startswith(f"{protocol},"):
                continue
            ratio = statistics.median(slow / fast for slow, fast in zip(seconds[other], seconds[name], strict=True))
            pairs = zip(choices(sums[name], lengths), choices(reference, lengths), strict=True)
            changed = sum(one != two for one, two in pairs)
            rate = f"{len(items) / statistics.median(seconds[name]):.2f}"
            rows.append([name, rate, f"{ratio:.2f} ({other})", f"{furthest(sums[name], reference):.1e}", changed])
    return table(["", "items a second", "times that of", "log-likelihoods within", "other choices"], rows)


def one_at_a_time(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict]) -> Sums:
    sums = []
    for item in items:
        context = tokenizer.encode(item["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in item["endings"]]
        size = len(context) + max(map(len, endings))
        tokens, is_ending = torch.zeros(4, size, dtype=torch.long), torch.zeros(4, size)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            is_ending[row, len(context) : len(context) + len(ending)] = 1
        tokens, is_ending = tokens.to(model.device), is_ending.to(model.device)
        with torch.no_grad():
            logits = model(tokens).logits
        shifted, targets = logits[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), reduction="none").view(4, -1)
        sums.append((-(losses * is_ending[:, 1:]).sum(dim=1)).tolist())
    return sums


def scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict],
    protocol: Protocol,
    batch_size: int,
    mixed_precision: str,
) -> Sums:
    with side_by_side.autocast(mixed_precision):
        encoded = encode_items(model.config, tokenizer, items, protocol)
        scores = score_items(model, encoded, batch_size, as_trees=can_be_trees(model, encoded))
    return [score["loglikelihoods"] for score in scores]


def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[dict], batch_size: int
) -> Callable[[], Sums]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import preprocess

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4 * batch_size)
    requests = []
    for item in items:
        query = preprocess(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
        for index, ending in enumerate(item["endings"]):
            requests.append(Instance("loglikelihood", item, (query, " " + preprocess(ending)), index))

    def score() -> Sums:
        flat = [total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        return [flat[start : start + 4] for start in range(0, len(flat), 4)]

    return score


def furthest(sums: Sums, reference: Sums) -> float:
    return (torch.tensor(sums, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)).abs().max().item()


def choices(sums: Sums, lengths: list[list[int]]) -> list[int]:
    """`pred` of all items, then `pred_norm` of all items."""
    means = [[total / size for total, size in zip(*pair, strict=True)] for pair in zip(sums, lengths, strict=True)]
    return [values.index(max(values)) for values in [*sums, *means]]


if __name__ == "__main__":
    run_script(main)
