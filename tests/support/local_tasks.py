"""Tasks of lm-evaluation-harness as YAML files, on generated items: all kinds of requests that it makes."""

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

from support.generated_items import TEXT, generated_records

HELLASWAG = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
# Run before lm-evaluation-harness's own command, which lists its 14,000 tasks first: 15 seconds.
OWN_TASKS_ALONE = """
import functools, lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
"""
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# A single end of a text that depends on a context, as LAMBADA has.
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{ctx}}",
    "doc_to_target": "{{' ' + endings[label | int]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc"},
    ],
}
KINDS: dict[str, dict[str, Any]] = {
    "four": {**CHOICES, "doc_to_text": "Q: {{ctx}}\nA:", "doc_to_choice": "endings", "doc_to_target": "label"},
    # Answers of a letter, behind the same examples for all items: long beginnings that items share.
    "letters": {
        **CHOICES,
        "doc_to_text": "{{ctx}}\nA. {{endings[0]}}\nB. {{endings[1]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "label",
        "fewshot_config": {"sampler": "first_n"},
    },
    # The contexts differ and what follows is the same, as in WinoGrande.
    "contexts": {
        **CHOICES,
        "doc_to_text": "label",
        "doc_to_choice": "{{[ctx + ' ' + endings[0], ctx + ' ' + endings[1], ctx, endings[0]]}}",
        "doc_to_target": "{{endings[2]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "sentences": {
        **CHOICES,
        "doc_to_text": "",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "num_fewshot": 0,
    },
    "last_word": LAST_WORD,
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{endings[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "hellaswag_of_a_file": {"include": str(HELLASWAG)},
}


def write_tasks(folder: Path, count: int = 7) -> dict[str, Path]:
    """Write a YAML file for each kind. Returns the files by the tasks' names."""
    items, pages = folder / "items.jsonl", folder / "pages.jsonl"
    records = generated_records(count)
    items.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [TEXT[:2000], "One line.", TEXT[2000:2700]]
    pages.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    files = {}
    for name, settings in KINDS.items():
        data = str(pages if name == "pages" else items)
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": data, "train": data}, "cache_dir": str(folder / "cache")},
            "validation_split": "validation",
            "training_split": None,
            "fewshot_split": "train",
        }
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump({**settings, **source, "task": name}))
    return files
