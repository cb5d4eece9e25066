"""
The log-likelihood of continuations, such as the endings of a multiple-choice item, that go on from one context.

They are given to the model as a tree: what several of them begin with is there once, and each token sees those on its
way from the root alone. An item of HellaSwag is then half as many tokens as its four endings each behind the context.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from modeling_gpt2scratch.one_dnn import fastest_linear

ROWS_OF_LOGITS = 64  # normalised at once: a few megabytes, which stay in a CPU's cache


class Continuation(NamedTuple):
    """
    Attributes:
        token_ids: context and continuation. The last token is only predicted, never given to the model.
        num_scored: the last so many tokens are the continuation, 1 to len(token_ids) - 1.
    """

    token_ids: list[int]
    num_scored: int


class TokenTree:
    """
    Sequences of tokens, of which the nodes are the beginnings: each is there once.

    Attributes:
        token_ids, depths, members: for each node its token, how many nodes are above it, which is its position in all
            of its sequences, and those sequences, a bit each.
        paths: for each sequence, the nodes of its tokens.
    """

    def __init__(self, sequences: list[list[int]]):
        self.token_ids: list[int] = []
        self.depths: list[int] = []
        self.members: list[int] = []
        self.paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}  # by node, or -1 at the beginning, and token
        for index, tokens in enumerate(sequences):
            node, path = -1, []
            for depth, token_id in enumerate(tokens):
                node = children.setdefault((node, token_id), len(children))
                if node == len(self.token_ids):
                    self.token_ids.append(token_id)
                    self.depths.append(depth)
                    self.members.append(0)
                self.members[node] |= 1 << index
                path.append(node)
            self.paths.append(path)

    def __len__(self) -> int:
        return len(self.token_ids)


def loglikelihoods(model: PreTrainedModel, groups: Sequence[list[Continuation]], as_trees: bool) -> list[list[float]]:
    """
    Args:
        model: a causal language model of transformers, in eval mode.
        groups: of up to 63 continuations that are likely to begin alike; one forward pass for all groups.
        as_trees: whether the model can be given trees, see `takes_trees`; otherwise each continuation is a row.

    Returns:
        For each group, the summed log-likelihoods of its continuations, in nats.
    """
    flat = [continuation for group in groups for continuation in group]
    if as_trees:
        trees = [token_tree(group) for group in groups]
        inputs = _inputs_of_trees(trees, model.device, model.dtype)
        places = [(row, path) for row, tree in enumerate(trees) for path in tree.paths]
    else:
        inputs = {"input_ids": _padded([each.token_ids[:-1] for each in flat], model.device)}
        # Padding on the right needs no attention mask: no token sees what comes after it.
        places = [(row, list(range(len(each.token_ids) - 1))) for row, each in enumerate(flat)]
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
        normalisers = torch.cat([part.float().logsumexp(-1) for part in logits.split(ROWS_OF_LOGITS)])
        scores = (logits[which, targets].float() - normalisers[which]).cpu().double()
    sums = iter(part.sum().item() for part in scores.split([each.num_scored for each in flat]))
    return [[next(sums) for _ in group] for group in groups]


def takes_trees(model: PreTrainedModel, groups: Sequence[list[Continuation]]) -> bool:
    """
    Whether a model sees trees as they are meant, found out on `groups`, the longest and the largest that there are:
    one that counts positions or limits attention in a way of its own gives other log-likelihoods than for rows.

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
            expected = [loglikelihoods(model, [group], as_trees=False)[0] for group in groups]
            found = [loglikelihoods(model, [group], as_trees=True)[0] for group in groups]
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError):  # a mask of four dimensions is not for every model
        return False
    finally:
        hook.remove()
    tolerance = 1e-5 if all(torch.finfo(dtype).bits >= 32 for dtype in dtypes) else 2e-3
    pairs = zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    return all(math.isclose(one, other, rel_tol=tolerance) for one, other in pairs)


def token_tree(continuations: list[Continuation]) -> TokenTree:
    """Of what the model is given of them."""
    return TokenTree([continuation.token_ids[:-1] for continuation in continuations])


def _inputs_of_trees(trees: list[TokenTree], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Trees side by side: `input_ids` and `position_ids`, (B, T), and `attention_mask`, (B, 1, T, T), 0 or minimal."""
    depths = _padded([tree.depths for tree in trees], device)
    members = _padded([tree.members for tree in trees], device)
    # Of two nodes with a sequence in common, the one is on the way to the other.
    sees = (members.unsqueeze(2) & members.unsqueeze(1) != 0) & (depths.unsqueeze(2) >= depths.unsqueeze(1))
    sees |= torch.eye(depths.shape[1], dtype=torch.bool, device=device)  # padding sees itself, or softmax gives NaN
    # Not bool, which only some attention implementations take.
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    input_ids = _padded([tree.token_ids for tree in trees], device)
    return {"input_ids": input_ids, "position_ids": depths, "attention_mask": mask.unsqueeze(1)}


def _padded(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


@contextmanager
def _logits_only_of(model: PreTrainedModel, positions: tuple[torch.Tensor, torch.Tensor]):
    """
    The other logits, most of the memory, are never made: a hook narrows the head's input, (B, T, C) -> (N, C). To call
    base model and head one by one would leave out what some models do to logits (Gemma caps them), and go past the
    hooks of a sharded model.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][positions],))
    try:
        yield
    finally:
        hook.remove()
