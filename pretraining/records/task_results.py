"""Results of evaluation tasks, in a form that needs no evaluation library: for metrics.jsonl and the model card."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskSource:
    """
    The items that a task's results are on.

    Attributes:
        task: its name.
        title: the same, for people.
        dataset: on the Hub, or the name of a file.
        config, split, revision: of the dataset; None where there is none, or nobody knows it.
        num_items: how many were scored.
        is_whole: these are all items of the split.
        setting: how they were scored, as "0-shot, lm-evaluation-harness".
        details: what else tells how, for the card's metadata.
    """

    task: str
    title: str
    dataset: str
    config: str | None
    split: str | None
    revision: str | None
    num_items: int
    is_whole: bool
    setting: str
    details: dict[str, str | int | float]


@dataclass(frozen=True)
class TaskResult:
    """
    A figure of a task.

    Attributes:
        metric: its name.
        value: accuracies are fractions.
        stderr: standard error, None if it is not known.
    """

    source: TaskSource
    metric: str
    value: float
    stderr: float | None


def task_results(sources: list[TaskSource], metrics: dict[str, Any]) -> list[TaskResult]:
    """
    Return the results of tasks.

    Args:
        metrics: `TASK_METRIC`, `TASK_METRIC_stderr` and, where it is known, the number of items as `TASK_n`. Results
            on another number of items than the source's are left out: an earlier command had another limit.
    """
    results = []
    for key, value in metrics.items():
        owners = [source for source in sources if key.startswith(f"{source.task}_")]
        if owners and value is not None and not key.endswith(("_stderr", "_n")):
            source = max(owners, key=lambda source: len(source.task))
            if metrics.get(f"{source.task}_n", source.num_items) == source.num_items:
                metric = key.removeprefix(f"{source.task}_")
                results.append(TaskResult(source, metric, value, metrics.get(f"{key}_stderr")))
    return results


def commit_of(dataset: Any) -> str | None:
    """Return the commit of a dataset that `datasets` loaded from the Hub, which is a part of its path in the cache."""
    parts = {part for file in getattr(dataset, "cache_files", []) for part in Path(file["filename"]).parts}
    return next((part for part in parts if re.fullmatch("[0-9a-f]{40}", part)), None)
