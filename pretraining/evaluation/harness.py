"""
Tasks of EleutherAI's lm-evaluation-harness: find them by name, evaluate a model on them, and name their results.

Only imported where tasks are asked for: the harness is an extra, and takes seconds to import.
"""

import contextlib
import io
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
import tqdm
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from pretraining.errors import ProcessError, UserError, nearest, one_line
from pretraining.evaluation.harness_model import TreeLM
from pretraining.evaluation.loglikelihood import evaluating
from pretraining.records.task_results import TaskSource, commit_of

# Tasks that are known to move between 124M and 1.5B parameters. Sources: docs/evaluation.md.
SMALL_LM = [
    "lambada_openai",
    "hellaswag",
    "piqa",
    "arc_easy",
    "winogrande",
    "sciq",
    "blimp",
    "wikitext",
]
PRESETS = {"small_lm": SMALL_LM}
# Of the standard errors that have no formula. The harness's 100,000 take minutes. An error by n of them is within some
# 1 / sqrt(2 n) of itself, here 2 %.
BOOTSTRAP_ITERATIONS = 1000
MAX_NEW_TOKENS = 256  # of a task that names no number: the harness's HFLM.max_gen_toks
SEED = 1234  # the harness's, of examples, numpy and torch; that of `random` is 0
PACKAGED = ("json", "csv", "parquet", "text", "arrow")  # kinds of files, where other tasks name a dataset


class SilentBar(tqdm.tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


class FigureError(UserError):
    """A figure that cannot be computed: the perplexity per word of a model that knows nothing may be above 1e308."""


@dataclass
class Tasks:
    """
    Tasks that were found, with their data.

    Attributes:
        tasks: by name.
        groups: by name: several tasks whose results the harness also gives as one.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)

    def problems(self, max_length: int, is_sharded: bool = False) -> list[str]:
        """
        Return a message for each task that a model cannot do.

        Args:
            max_length: the model's positions.
            is_sharded: each process holds a part of its weights.
        """
        found = []
        for name, task in self.tasks.items():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            if is_sharded:
                found.append(f"{name} generates text, which a sharded model cannot do while it trains: leave it out")
            num_tokens = normalize_gen_kwargs(task.config.generation_kwargs or {}, MAX_NEW_TOKENS)["max_gen_toks"]
            if num_tokens >= max_length:
                found.append(
                    f"{name} generates up to {num_tokens:,} tokens after its context, but the model has only "
                    f"{max_length:,} positions: leave it out"
                )
        return found


def load_tasks(names: Sequence[str], include_path: str | None = None, num_fewshot: int | None = None) -> Tasks:
    """
    Find tasks and load their data.

    Args:
        names: of tasks, groups or tags of the harness, with * and ?; presets; or the paths of YAML files.
        include_path: a folder with YAML files of further tasks.
        num_fewshot: examples before each item; each task's own number if left out.

    Raises:
        UserError: for an unknown name, with the nearest one; for a task whose data cannot be loaded, that no model
            here can do, or that is asked for with two numbers of examples.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    names = [name for each in names for name in PRESETS.get(each, [each])]
    manager = _task_manager(names, include_path)
    specs: list[str] = []
    unknown: list[str] = []
    for name in names:
        matches = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            hint = nearest(name, manager.all_tasks)
            unknown.append(f"lm-evaluation-harness has no task '{name}'{hint} (lm-eval ls tasks lists all)")
        specs += matches
    if unknown:
        raise UserError(*unknown)
    found = Tasks()
    for name in dict.fromkeys(specs):
        with _errors_as_user_errors(f"the task {name} cannot be loaded"), _quiet(), _seeded():
            loaded = manager.load([name])
            for task in loaded["tasks"].values():
                _ = task.eval_docs
        for task in loaded["tasks"].values():
            # As the harness does: a task that fixes it at 0 keeps that.
            fixed = task.get_config("num_fewshot")
            if fixed is None or (num_fewshot is not None and fixed != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
        _check(loaded["tasks"], found.tasks)
        found.tasks |= loaded["tasks"]
        found.groups |= loaded.get("groups", {})
    return found


def _check(tasks: dict[str, Any], before: dict[str, Any]) -> None:
    """
    Raises:
        UserError: for each task that cannot be evaluated, or differs from the one of its name that was found before.
    """
    problems = []
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"the task {name} runs code that the model writes, which is not supported: leave it out")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"the task {name} has images or sound, and the models here read text: leave it out")
        if set(getattr(task, "_metric_fn_list", None) or []) == {"bypass"}:
            problems.append(f"the task {name} has no metric, it only collects answers: leave it out")
        if name in before:
            shots = sorted(each.get_config("num_fewshot") for each in (task, before[name]))
            if shots[0] != shots[1]:
                problems.append(
                    f"the task {name} is given twice, with {shots[0]} and {shots[1]} examples before each item: "
                    "give it once"
                )
    if problems:
        raise UserError(*problems)


def _task_manager(names: list[str], include_path: str | None) -> TaskManager:
    """List the tasks there are; not the harness's own 14,000, which takes seconds, if these need none of them."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(Path(name).is_file() or name in own.all_subtasks for name in names):
        return own
    return TaskManager(include_path=include_path)


def run_tasks(lm: TreeLM, tasks: Tasks, limit: int | None = None, log_samples: bool = False) -> dict[str, Any]:
    """
    Evaluate a model on tasks. Every process that shares the work has to call this, and gets the same results, but for
    standard errors by bootstrap, which the main process has alone.

    Args:
        limit: items of each task; all if left out.
        log_samples: keep each item with its answers.

    Returns:
        The harness's results: `results` by task, `versions`, `n-shot`, `n-samples`, `configs`, and so on.

    Raises:
        FigureError: if the answers give no figure.
        UserError: if a task fails.
    """
    is_main = lm.sharing is None or lm.sharing.is_main_process
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork of a process with torch's threads may hang
    rank = lm.sharing.process_index if lm.sharing else 0
    torch.manual_seed(SEED + rank)  # of texts that are sampled
    with evaluating(lm.model), _quiet(), _seeded(), _errors_as_user_errors("lm-evaluation-harness", ProcessError):
        return evaluate(
            lm,
            {"tasks": tasks.tasks, "groups": tasks.groups},
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS if is_main else 0,
            log_samples=log_samples,
        )


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """Return `TASK_METRIC` and, where it is known, `TASK_METRIC_stderr`; of a group with a result, that alone."""
    metrics = {}
    groups = results.get("groups", {})
    parts = {task for group in groups for task in results["group_subtasks"].get(group, [])}
    for task, values in {**results["results"], **groups}.items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if task not in parts and filter_name and isinstance(value, int | float):
                suffix = "" if filter_name == "none" else f"_{filter_name}"
                suffix += "_stderr" if name.endswith("_stderr") else ""
                metrics[f"{task}_{name.removesuffix('_stderr')}{suffix}"] = float(value)
    return metrics


def sources_of(tasks: Tasks, limit: int | None = None) -> list[TaskSource]:
    """Return what the results of tasks and groups are on. Args: see `run_tasks`."""
    members = {name: [name] for name in tasks.tasks}
    members |= {name: [task.task_name for task in group.get_all_tasks()] for name, group in tasks.groups.items()}
    return [_source_of(name, [tasks.tasks[each] for each in parts], limit) for name, parts in members.items() if parts]


def _source_of(name: str, tasks: list[Any], limit: int | None) -> TaskSource:
    first = tasks[0].config
    numbers = [len(task.eval_docs) for task in tasks]
    datasets_of = {task.config.dataset_path or task.DATASET_PATH or name for task in tasks}  # of classes, the latter
    dataset = datasets_of.pop() if len(datasets_of) == 1 else name
    is_of_the_hub = dataset not in (*PACKAGED, name) and not Path(dataset).exists()
    shots = sorted({task.get_config("num_fewshot") or 0 for task in tasks})
    return TaskSource(
        task=name,
        title=name,
        dataset=dataset if is_of_the_hub else name,
        config=first.dataset_name if len(tasks) == 1 else None,
        split=first.test_split or first.validation_split,
        revision=commit_of(tasks[0].eval_docs) if is_of_the_hub else None,
        num_items=sum(min(number, limit or number) for number in numbers),
        is_whole=all(limit is None or number <= limit for number in numbers),
        setting=f"{' and '.join(map(str, shots))}-shot, lm-evaluation-harness",
        details={"task": name, "num_fewshot": shots[0], "lm_eval": version("lm-eval")},
    )


@contextlib.contextmanager
def _quiet():
    """Keep what the harness prints from standard output, and its bars, but for those of the model, away."""
    before = tqdm.tqdm, lm_eval.api.task.tqdm
    tqdm.tqdm, lm_eval.api.task.tqdm = SilentBar, SilentBar
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.tqdm, lm_eval.api.task.tqdm = before


@contextlib.contextmanager
def _seeded():
    """Seed what tasks shuffle with, equally on all processes, and leave the generators as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def _errors_as_user_errors(what: str, kind: type[UserError] = UserError):
    """Turn whatever the harness, a task's code or `datasets` raises, of many kinds, into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except ArithmeticError as error:
        raise FigureError(f"{what}: {one_line(error)}: the model's answers are too improbable for a figure") from error
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {one_line(error)}") from error
