"""
Group continuations that share a beginning, so that a model computes it once, and put the groups into batches.

A group becomes one row of a forward pass: a tree of tokens, or plain text where no sequence branches off.
"""

import math
from collections.abc import Sequence

from pretraining.evaluation.loglikelihood import Continuation, num_shared

# How many pairs of tokens in masked attention take as long as one token in the rest of a block, per dimension of the
# hidden states. By the operations it is 6: 12 C^2 against 2 C.
PAIRS_PER_DIMENSION = 2
# Of a tree. Its mask has that number squared.
MAX_NODES = 2048


def group_by_prefix(continuations: Sequence[Continuation], hidden_size: int | None) -> list[list[int]]:
    """
    Group continuations whose common beginning is worth sharing.

    In the order of their tokens, those with long common beginnings are next to each other. A continuation joins the
    group before it if the tokens it saves there outweigh what it adds to the group's attention, in which each token
    is compared with all others, also with those that it must not attend to.

    Args:
        hidden_size: of the model; None for groups that do not branch, as every model takes them.

    Returns:
        The indices of each group.
    """
    inputs = [continuation.token_ids[:-1] for continuation in continuations]
    groups: list[list[int]] = []
    before: list[int] = []
    num_nodes = 0
    for index in sorted(range(len(inputs)), key=lambda index: inputs[index]):
        shared = num_shared(before, inputs[index])
        added = len(inputs[index]) - shared
        if hidden_size is None or shared == len(before):  # goes on from the end of the one before
            joins = shared == len(before)
        else:
            cost = added * (2 * num_nodes + added) - len(inputs[index]) ** 2  # in pairs
            joins = num_nodes + added <= MAX_NODES and shared * PAIRS_PER_DIMENSION * hidden_size > cost
        if groups and joins:
            groups[-1].append(index)
            num_nodes += added
        else:
            groups.append([index])
            num_nodes = len(inputs[index])
        before = inputs[index]
    return groups


def into_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Put rows of these sizes into batches: rows of like sizes together, which need little padding, the largest first, so
    that memory runs out at once or never.

    Args:
        max_tokens: of a batch with its padding. A larger row is a batch by itself.

    Returns:
        The indices of each batch.
    """
    batches: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if not batches or len(batches[-1]) == rows:
            batches.append([])
            rows = max(1, math.floor(max_tokens / sizes[index]))
        batches[-1].append(index)
    return batches
