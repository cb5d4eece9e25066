"""
Results of evaluation tasks as the Hub reads them: the model card's `model-index`, and `.eval_results/*.yaml`, which
takes its place (https://huggingface.co/docs/hub/eval-results).
"""

from datetime import UTC, datetime
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from pretraining.records.task_results import TaskResult

FOLDER = ".eval_results"
NAMES = {"acc": "accuracy", "acc_norm": "accuracy, normalised by length"}


def card_entries(results: list[TaskResult]) -> list[EvalResult]:
    """Return the entries of a model card's metadata."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.source.dataset,
            dataset_name=result.source.title,
            dataset_config=result.source.config,
            dataset_split=result.source.split,
            dataset_revision=result.source.revision,
            metric_type=result.metric,
            metric_name=f"{NAMES.get(result.metric, result.metric)}, {result.source.setting}",
            metric_value=round(result.value, 4),
            metric_args={
                **result.source.details,
                "n": result.source.num_items,
                "stderr": result.stderr and round(result.stderr, 4),
            },
        )
        for result in results
    ]


def result_files(results: list[TaskResult]) -> dict[str, str]:
    """
    Return the text of each `.eval_results/*.yaml` by name, a file for each task and setting. Results on a part of the
    items, or on data that is not on the Hub, have no place in that format, and are left out.
    """
    files: dict[str, list[EvalResultEntry]] = {}
    today = datetime.now(UTC).date().isoformat()
    for result in results:
        source = result.source
        if source.is_whole and "/" in source.dataset and not Path(source.dataset).exists():
            error = "" if result.stderr is None else f", standard error {result.stderr:.4f}"
            entry = EvalResultEntry(
                dataset_id=source.dataset,
                task_id=source.task,
                value=round(result.value, 4),
                dataset_revision=source.revision,
                date=today,
                notes=f"{result.metric}, {source.setting}, {source.num_items} items{error}",
            )
            setting = source.setting.split(",")[0].replace(" ", "-")
            files.setdefault(f"{FOLDER}/{source.task}-{setting}.yaml", []).append(entry)
    return {
        name: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) for name, entries in files.items()
    }
