"""
Score continuations by their log-likelihood, such as the endings of a multiple-choice item, which share a context.

The model is given trees of tokens: a beginning that several sequences share is computed once, and each token attends
to those on its path from the root. An item of HellaSwag is then half as many tokens as its four endings, each behind
the context.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from modeling_gpt2scratch.one_dnn import fastest_linear

CHECKED = 8  # continuations of a tree: the last ones are furthest from where they would be in plain text
ROWS_OF_LOGITS = 64  # normalised at once: a few megabytes, which stay in a CPU's cache


class Continuation(NamedTuple):
    """
    A sequence of tokens whose end is scored.

    Attributes:
        token_ids: context and continuation. The last token is only predicted, never given to the model.
        num_scored: the last so many tokens are the continuation, 1 to len(token_ids) - 1.
    """

    token_ids: list[int]
    num_scored: int


class Score(NamedTuple):
    """
    The score of a continuation.

    Attributes:
        loglikelihood: the sum over its tokens, in nats.
        is_greedy: each of its tokens is the most probable one.
    """

    loglikelihood: float
    is_greedy: bool


class TokenTree:
    """
    The beginnings of several sequences, each beginning once.

    The nodes are in depth-first order, so that those below a node follow it directly: node k is on the path to node q
    if k <= q < ends[k].

    Attributes:
        token_ids, depths, ends: for each node its token, its position in the sequences it is in, and the first node
            that is not below it.
        paths: for each sequence, the nodes of its tokens.
    """

    def __init__(self, sequences: Sequence[list[int]]):
        self.token_ids: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.paths: list[list[int]] = [[] for _ in sequences]
        path: list[int] = []  # of the sequence before
        before: list[int] = []
        for index in sorted(range(len(sequences)), key=lambda index: sequences[index]):
            tokens = sequences[index]
            shared = num_shared(before, tokens)
            self._close(path[shared:])
            new = range(len(self), len(self) + len(tokens) - shared)
            self.token_ids += tokens[shared:]
            self.depths += range(shared, len(tokens))
            self.ends += [0] * len(new)
            before, path = tokens, [*path[:shared], *new]
            self.paths[index] = path
        self._close(path)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """True if each sequence is the beginning of the longest one."""
        return len(self) == max(map(len, self.paths))

    def _close(self, nodes: list[int]) -> None:
        for node in nodes:
            self.ends[node] = len(self)


def num_shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (token, another) in pairs if token != another), min(len(one), len(other)))


def score_continuations(model: PreTrainedModel, groups: Sequence[list[Continuation]]) -> list[list[Score]]:
    """
    Score all continuations in one forward pass, each group as one row: as a tree, or, where no group branches, as
    plain text.

    Args:
        model: a causal language model of transformers, in eval mode. Only groups that do not branch are for every
            model, see `takes_trees`.
        groups: continuations that begin alike.
    """
    trees = [token_tree(group) for group in groups]
    inputs = _plain_inputs(trees, model) if all(tree.is_chain for tree in trees) else _tree_inputs(trees, model)
    flat = [continuation for group in groups for continuation in group]
    places = [(row, path) for row, tree in enumerate(trees) for path in tree.paths]
    # A token is predicted by the one before it, the last of the context by several.
    width = inputs["input_ids"].shape[1]
    nodes, next_ids = [], []
    for (row, path), (token_ids, num_scored) in zip(places, flat, strict=True):
        nodes += [row * width + node for node in path[-num_scored:]]
        next_ids += token_ids[-num_scored:]
    predictors, which = torch.tensor(nodes).unique(return_inverse=True)
    which, targets = which.to(model.device), torch.tensor(next_ids, device=model.device)
    positions = (predictors // width).to(model.device), (predictors % width).to(model.device)
    with torch.no_grad(), fastest_linear(model.device), _logits_only_of(model, positions):
        logits = model(**inputs, use_cache=False).logits  # (len(predictors), vocabulary)
        highest, normalisers = map(torch.cat, zip(*map(_normalise, logits.split(ROWS_OF_LOGITS)), strict=True))
        target_logits = logits[which, targets].float()
        scores = (target_logits - normalisers[which]).cpu().double()
        # Of equal logits, greedy decoding takes the first.
        hits = target_logits == highest[which]
        hits[hits.clone()] = logits[which[hits]].argmax(-1) == targets[hits]
        hits = hits.cpu()
    lengths = [each.num_scored for each in flat]
    pairs = zip(scores.split(lengths), hits.split(lengths), strict=True)
    results = iter([Score(part.sum().item(), bool(part_hits.all())) for part, part_hits in pairs])
    return [[next(results) for _ in group] for group in groups]


def _normalise(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest and the log-sum-exp of each row in fp32. torch's logsumexp does not return the first."""
    logits = logits.float()
    highest = logits.amax(-1)
    return highest, highest + (logits - highest.unsqueeze(-1)).exp_().sum(-1).log()


def takes_trees(model: PreTrainedModel, groups: Sequence[list[Continuation]]) -> bool:
    """
    Return True if the model scores trees as it scores plain text. A model that counts positions or limits attention in
    a way of its own gives other log-likelihoods.

    Args:
        groups: those to find out with, the longest and the largest that there are.

    Raises:
        ValueError: if the model has no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"a {type(model).__name__} has no output embeddings: it is no language model")
    parameters = inspect.signature(model.forward).parameters
    if not {"attention_mask", "position_ids"} <= parameters.keys() or is_flash_attention_requested(model.config):
        return False
    dtypes = set()
    hook = head.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    try:
        # Rounding to 16 bits would hide a small error. A model that accelerate has prepared rounds all the same.
        with torch.autocast(model.device.type, enabled=False):
            found = [score_continuations(model, [group])[0][-CHECKED:] for group in groups]
            expected = [score_continuations(model, [[each]])[0] for group in groups for each in group[-CHECKED:]]
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError):  # a mask of four dimensions is not for every model
        return False
    finally:
        hook.remove()
    # Relative, and absolute for answers of a token or two.
    tolerance, least = (1e-5, 1e-4) if all(torch.finfo(dtype).bits >= 32 for dtype in dtypes) else (2e-3, 0.05)
    pairs = zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    return all(
        math.isclose(one.loglikelihood, other.loglikelihood, rel_tol=tolerance, abs_tol=least) for one, other in pairs
    )


def token_tree(continuations: list[Continuation]) -> TokenTree:
    """Return the tree of what the model is given of continuations."""
    return TokenTree([continuation.token_ids[:-1] for continuation in continuations])


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off; afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _plain_inputs(trees: list[TokenTree], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return `input_ids`, (B, T). Padding on the right needs no mask: no token attends to what comes after it."""
    return {"input_ids": _padded([tree.token_ids for tree in trees], model.device)}


def _tree_inputs(trees: list[TokenTree], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `position_ids`, (B, T), and `attention_mask`, (B, 1, T, T), 0 or the lowest number."""
    device, dtype = model.device, model.dtype
    depths = _padded([tree.depths for tree in trees], device)
    nodes = torch.arange(depths.shape[1], device=device)
    # Padding ends after itself, so that it attends to itself: to nothing at all, softmax would give NaN.
    ends = _padded([tree.ends for tree in trees], device).maximum(nodes + 1)
    attends = (nodes <= nodes[:, None]) & (nodes[:, None] < ends[:, None])  # (B, queries, keys)
    # Not bool, which only some attention implementations take.
    mask = torch.zeros(attends.shape, dtype=dtype, device=device).masked_fill_(~attends, torch.finfo(dtype).min)
    input_ids = _padded([tree.token_ids for tree in trees], device)
    return {"input_ids": input_ids, "position_ids": depths, "attention_mask": mask.unsqueeze(1)}


def _padded(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


@contextmanager
def _logits_only_of(model: PreTrainedModel, positions: tuple[torch.Tensor, torch.Tensor]):
    """
    Compute no other logits, which are most of the memory: a hook narrows the head's input, (B, T, C) -> (N, C).
    Calling base model and head one by one would leave out what some models do to logits (Gemma caps them), and go past
    the hooks of a sharded model.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][positions],))
    try:
        yield
    finally:
        hook.remove()
