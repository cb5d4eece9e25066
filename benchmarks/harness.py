"""
Items a second of lm-evaluation-harness's tasks: through its own Hugging Face model, and through trees of tokens.

    pip install lm-eval
    python benchmarks/harness.py --tokenizer_name openai-community/gpt2
    python benchmarks/harness.py --tokenizer_name gpt2 --tasks piqa.yaml lambada.yaml --limit 24

Both answer the same requests with the same model, of random weights, in turns, in this process, from texts to
log-likelihoods. The harness has its best batch size for each task, found with a part of the items; the trees have as
many tokens at once. Beside the speed is the factor that the tokens alone would give: those of the harness's rows over
those of the trees, without padding. The rest comes from logits that nobody needs, padding, and the products on a CPU.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.evaluation.harness import SMALL_LM, load_tasks
from pretraining.evaluation.harness_model import TreeLM
from pretraining.evaluation.loglikelihood import Continuation, token_tree
from pretraining.markdown import table
from pretraining.tokenization.tokenizer import load_tokenizer

BATCH_SIZES = (1, 4, 8, 16, 32)  # of the harness


@dataclass
class BenchmarkArguments:
    tasks: list[str] = flag(SMALL_LM, "names of the harness's tasks, or YAML files", nargs="+")
    num_fewshot: list[int] = flag([0, 5], "examples before each item", nargs="+")
    tokenizer_name: str = flag("openai-community/gpt2", "a tokenizer: a folder, or a name on the Hub")
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    limit: int = flag(24, "so many items of each task, evenly spread over all of them")
    rounds: int = flag(3, "how often")


class Counted(TreeLM):
    """Counts the tokens that the model is given, without padding, in rows and in trees."""

    rows = trees = 0

    def _plan(self, continuations: list[Continuation], max_tokens: int) -> list[list[list[int]]]:
        batches = super()._plan(continuations, max_tokens)
        # The harness computes requests that differ in their last token once.
        self.rows = sum(map(len, {tuple(each.token_ids[:-1]) for each in continuations}))
        groups = [[continuations[index] for index in group] for batch in batches for group in batch]
        self.trees = sum(len(token_tree(group)) for group in groups)
        return batches


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    device = side_by_side.device()
    if device.type == "cpu":
        hardware.keep_freed_memory()
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(args.config_name)).to(device).eval()
    tokenizer = load_tokenizer(args.tokenizer_name)
    rows = []
    for num_fewshot in args.num_fewshot:
        for name in args.tasks:
            for task in load_tasks([name], num_fewshot=num_fewshot).tasks.values():
                if task.get_config("num_fewshot") == num_fewshot and not (num_fewshot and is_rolling(task)):
                    rows.append(compare(model, tokenizer, task, num_fewshot, args))
                    print(rows[-1], file=sys.stderr, flush=True)
    header = ["task", "examples", "the harness, items/s (batch)", "trees, items/s", "times", "by the tokens alone"]
    print(
        side_by_side.section(
            ("torch", "transformers", "lm-eval"),
            f"{args.config_name} in fp32, {args.limit} items of each task, evenly spread, "
            f"medians of {args.rounds} rounds",
            table([*header, "log-likelihoods within", "other is_greedy"], rows),
        )
    )


def is_rolling(task: Any) -> bool:
    return task.OUTPUT_TYPE == "loglikelihood_rolling"


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    num_fewshot: int,
    args: BenchmarkArguments,
) -> list[object]:
    """Run both on a task's requests. Returns a line of the table."""
    task.set_fewshot_seed(1234)
    num_items = len(task.eval_docs)
    items = list(range(0, num_items, max(1, num_items // args.limit)))[: args.limit]
    task.build_all_requests(samples=items, rank=0, world_size=1)
    requests: list[Instance] = task.instances
    kind = "loglikelihood_rolling" if is_rolling(task) else "loglikelihood"

    def answer(lm: HFLM, requests: list[Instance]) -> list:
        return getattr(lm, kind)(requests, disable_tqdm=True)

    part = requests[: max(1, len(requests) // 4)]
    harness = {size: HFLM(model, tokenizer=tokenizer, batch_size=size) for size in BATCH_SIZES}
    seconds = {size: side_by_side.seconds(partial(answer, lm, part)) for size, lm in harness.items()}
    batch_size = min(seconds, key=lambda size: seconds[size])
    trees = Counted(model, tokenizer=tokenizer, batch_size=batch_size, progress=False)
    # Whether the model takes trees is found out before all items, of which there are few here.
    programs: dict[str, Callable[[], list]] = {
        "harness": partial(answer, harness[batch_size], requests),
        "trees": partial(answer, trees, requests),
    }
    answers = {"trees": programs["trees"]()}
    times: dict[str, list[float]] = {name: [] for name in programs}

    def run(name: str) -> None:
        answers[name] = programs[name]()

    for _ in range(args.rounds):
        for name in programs:
            times[name].append(side_by_side.seconds(partial(run, name)))
    ratio = statistics.median(slow / fast for slow, fast in zip(times["harness"], times["trees"], strict=True))
    rates = {name: f"{len(items) / statistics.median(each):.2f}" for name, each in times.items()}
    pairs = list(zip(answers["harness"], answers["trees"], strict=True))
    if is_rolling(task):
        furthest, others = max(abs(one / other - 1) for one, other in pairs), ""
        within = f"{furthest:.1e} of their size"
    else:
        within = f"{max(abs(one[0] - other[0]) for one, other in pairs):.1e}"
        others = str(sum(one[1] != other[1] for one, other in pairs))
    factor = f"{trees.rows / trees.trees:.2f}"
    name = task.config.task
    return [
        name,
        num_fewshot,
        f"{rates['harness']} ({batch_size})",
        rates["trees"],
        f"{ratio:.2f}",
        factor,
        within,
        others,
    ]


if __name__ == "__main__":
    run_script(main)
