"""Score HellaSwag items by the log-likelihood of their endings, on one process or on all."""

import functools
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from pretraining.errors import ProcessError, UserError, one_line
from pretraining.evaluation.hellaswag_items import EncodedItem, Protocol
from pretraining.evaluation.loglikelihood import evaluating, score_continuations, takes_trees, token_tree

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRIC = Path(__file__).resolve().parents[2] / "metrics" / "hellaswag"


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
            endings = [items[index].endings for index in batch]
            groups = endings if as_trees else [[ending] for four in endings for ending in four]
            sums = [score.loglikelihood for group in score_continuations(model, groups) for score in group]
            for position, index in enumerate(batch):
                scores[index] = score = to_score(items[index], sums[4 * position : 4 * position + 4])
                hits["acc"] += score["pred"] == score["label"]
                hits["acc_norm"] += score["pred_norm"] == score["label"]
            bar.set_postfix({name: f"{count / len(scores):.4f}" for name, count in hits.items()}, refresh=False)
            bar.update(len(batch))
    return [scores[index] for index in range(len(items))]


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
