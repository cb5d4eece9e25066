"""
A model for EleutherAI's lm-evaluation-harness that computes what requests share once: tasks, prompts and metrics are
the harness's, forward passes are those of `loglikelihood.py`.

After `import pretraining.evaluation.harness_model` the harness knows it as `gpt2scratch_tree`.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pretraining.errors import ProcessError, UserError
from pretraining.evaluation.loglikelihood import (
    Continuation,
    Score,
    TokenTree,
    evaluating,
    score_continuations,
    takes_trees,
    token_tree,
)
from pretraining.evaluation.prefix_groups import group_by_prefix, into_batches

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, of the continuation


@register_model("gpt2scratch_tree")
class TreeLM(HFLM):
    """
    The harness's own Hugging Face model, but for how log-likelihoods are computed.

    Requests that share a beginning, as the answers of an item do, and items behind the same examples, become trees of
    tokens (`prefix_groups.py`). A model that does not see trees rightly gets plain rows. Generation is the harness's.

    Args:
        pretrained: the name of a model, or a model.
        accelerator: the processes to share the requests with: each has to ask for all of them, and gets all results.
            Without it requests are those of this process, as the harness shares them out itself.
        progress: show progress bars.
        kwargs: those of the harness's model.
    """

    def __init__(
        self, pretrained: Any, accelerator: Accelerator | None = None, progress: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise UserError(f"{self.config.model_type} is not a causal language model")
        self.sharing = accelerator
        self.is_main = accelerator is None or accelerator.is_main_process
        self.progress = progress and self.is_main
        self.said: set[str] = set()
        self.largest_tree = self.deepest_tree = 0  # that the model was seen to take
        # A tokenizer warns of texts that are longer than the model's positions. They are cut, and counted.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not self.progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text as a whole, in the harness's windows."""
        windows: list[list[Request]] = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows)), disable_tqdm))
        sums = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        disable_tqdm = disable_tqdm or not self.progress
        if self.sharing is None or self.sharing.num_processes == 1:
            return super().generate_until(requests, disable_tqdm)
        rank, num_processes = self.sharing.process_index, self.sharing.num_processes
        shares = gather_object([super().generate_until(requests[rank::num_processes], disable_tqdm)])
        return [shares[index % num_processes][index // num_processes] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        continuations = [self._continuation(*request) for request in requests]
        num_cut = sum(len(context) + len(end) > self.max_length + 1 for _, context, end in requests)
        if num_cut:
            self._say_once(
                f"{num_cut:,} of {len(requests):,} requests are longer than the model's {self.max_length:,} positions "
                "and lose their beginning"
            )
        longest = max(range(len(requests)), key=lambda index: len(continuations[index].token_ids))
        batch_size = self.batch_size if self.batch_size != "auto" else self._detect_batch_size([requests[longest]])
        max_tokens = batch_size * (len(continuations[longest].token_ids) - 1)
        with evaluating(self.model):
            batches = self._plan(continuations, max_tokens)
            bar = tqdm(
                total=len(requests),
                disable=disable_tqdm or not self.progress or self.rank != 0,
                desc="Running loglikelihood requests",
            )
            with bar:
                scores = self._score(continuations, batches, bar)
        answers = [(score.loglikelihood, score.is_greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:  # not of a window
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _continuation(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> Continuation:
        """
        Cut a request on its left to the model's window, as the harness does. Of a continuation that is longer by
        itself, where the harness gives up, what fits is scored.
        """
        if not context or not continuation:
            raise UserError(f"a request has no tokens before or in its continuation: {texts}")
        token_ids = (context + continuation)[-(self.max_length + 1) :]
        return Continuation(token_ids, min(len(continuation), len(token_ids) - 1))

    def _plan(self, continuations: list[Continuation], max_tokens: int) -> list[list[list[int]]]:
        """Return batches of groups of continuations, by index: groups that branch first, then those that do not."""
        groups = group_by_prefix(continuations, getattr(self.config.get_text_config(), "hidden_size", None))
        trees = [token_tree([continuations[index] for index in group]) for group in groups]
        if not self._can_be_trees(continuations, groups, trees):
            groups = group_by_prefix(continuations, hidden_size=None)
            trees = [token_tree([continuations[index] for index in group]) for group in groups]
        batches = []
        for is_chain in (False, True):
            kind = [number for number, tree in enumerate(trees) if tree.is_chain == is_chain]
            sizes = [len(trees[number]) for number in kind]
            batches += [[groups[kind[place]] for place in batch] for batch in into_batches(sizes, max_tokens)]
        return batches

    def _can_be_trees(
        self, continuations: list[Continuation], groups: list[list[int]], trees: list[TokenTree]
    ) -> bool:
        """Return True if the model scores the groups rightly, which is found out on the largest and the deepest."""
        branching = [number for number, tree in enumerate(trees) if not tree.is_chain]
        if not branching:
            return True
        largest = max(branching, key=lambda number: len(trees[number]))
        deepest = max(branching, key=lambda number: max(trees[number].depths))
        size, depth = len(trees[largest]), max(trees[deepest].depths)
        if size > self.largest_tree or depth > self.deepest_tree:
            checked = [[continuations[index] for index in groups[number]] for number in {largest, deepest}]
            try:
                is_right = takes_trees(self.model, checked)
            except ValueError as error:
                raise UserError(str(error)) from None
            if not all(gather_object([is_right]) if self.sharing else [is_right]):
                self._say_once("this model does not see trees of tokens as it should: each request is a row")
                return False
            self.largest_tree, self.deepest_tree = max(size, self.largest_tree), max(depth, self.deepest_tree)
        return True

    def _score(self, continuations: list[Continuation], batches: list[list[list[int]]], bar: tqdm) -> list[Score]:
        """Score this process's share of the batches, and return the scores of all continuations."""
        rank, num_processes = 0, 1
        if self.sharing:
            rank, num_processes = self.sharing.process_index, self.sharing.num_processes
        # Equally many for all, filled up with the last one: a sharded model's forward pass is an exchange.
        share = range(rank, math.ceil(len(batches) / num_processes) * num_processes, num_processes)
        scores: dict[int, Score] = {}
        for number in share:
            batch = batches[min(number, len(batches) - 1)]
            groups = [[continuations[index] for index in group] for group in batch]
            with self._autocast():
                found = score_continuations(self.model, groups)
            for group, of_group in zip(batch, found, strict=True):
                scores |= zip(group, of_group, strict=True)
            bar.update(min(sum(map(len, batch)) * num_processes, bar.total - bar.n))
        if num_processes > 1:
            scores = {index: score for each in gather_object([scores]) for index, score in each.items()}
        if not all(math.isfinite(score.loglikelihood) for score in scores.values()):
            raise ProcessError("the model's log-likelihoods are not finite: its weights are not usable")
        return [scores[index] for index in range(len(continuations))]

    def _say_once(self, message: str) -> None:
        """Print a message that the main process did not print before: the training loop evaluates many times."""
        if self.is_main and message not in self.said:
            print(message, file=sys.stderr)
        self.said.add(message)

    def _autocast(self) -> AbstractContextManager:
        """Return what `mixed_precision_dtype` asks for; without it what is around the evaluation holds."""
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.mixed_precision_dtype)
