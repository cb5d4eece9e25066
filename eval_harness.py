"""
Evaluate a model on tasks of EleutherAI's lm-evaluation-harness, computing what answers and examples share only once.

    python eval_harness.py --model_name_or_path runs/demo --tasks small_lm --limit 100
    accelerate launch eval_harness.py --model_name_or_path openai-community/gpt2 --tasks arc_easy "mmlu_*" \\
        --num_fewshot 5 --output_file results.json --predictions_file items.jsonl

It needs `pip install lm-eval`. Tasks, prompts and metrics are the harness's, and so are the figures.
docs/evaluation.md tells which tasks say something about small models, and what GPT-2 reaches.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining.cli import flag, parse_arguments, problems_of_range, run_script
from pretraining.distributed.processes import on_every_process
from pretraining.errors import UserError
from pretraining.evaluation.script import AmountFlags, ResultFlags, open_accelerator
from pretraining.model_flags import LoadedModelFlags
from pretraining.publishing.card_edits import update_model_card
from pretraining.records.task_results import TaskSource, task_results
from pretraining.training.model import load_from_flags


@dataclass
class TaskFlags:
    _argument_group_name = "tasks"

    tasks: list[str] = flag(
        [], "names of the harness's tasks and groups, with * and ?; small_lm; or YAML files (required)", nargs="+"
    )
    include_path: str | None = flag(None, "a folder with YAML files of further tasks")
    num_fewshot: int | None = flag(None, "examples before each item; each task's own number if left out")


@dataclass
class HarnessArguments(ResultFlags, TaskFlags, AmountFlags, LoadedModelFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = self.problems_of_model() + self.problems_of_amount()
        if not self.tasks:
            found.append("--tasks is required: small_lm, or names of the harness's tasks")
        if find_spec("lm_eval") is None:
            found.append("lm-evaluation-harness is not installed: pip install lm-eval")
        if self.include_path and not Path(self.include_path).is_dir():
            found.append(f"--include_path {self.include_path} is not a folder")
        found += problems_of_range(self, ["num_fewshot"], 0)
        return found + self.problems_of_results(self, self.limit)


def main() -> None:
    args = parse_arguments(HarnessArguments, __doc__)
    from pretraining.evaluation.harness import load_tasks, metrics_of, run_tasks, sources_of  # an extra
    from pretraining.evaluation.harness_model import TreeLM

    accelerator = open_accelerator()

    tasks = on_every_process(lambda: load_tasks(args.tasks, args.include_path, args.num_fewshot))
    sources = sources_of(tasks, args.limit)
    model, tokenizer = load_from_flags(args)
    model.to(accelerator.device)
    lm = TreeLM(model, accelerator, tokenizer=tokenizer, batch_size=args.per_device_eval_batch_size)
    if problems := tasks.problems(lm.max_length):
        raise UserError(*problems)
    with accelerator.autocast():
        results = run_tasks(lm, tasks, args.limit, log_samples=args.predictions_file is not None)
    if accelerator.is_main_process:
        write_results(args, results, sources, metrics_of(results))
    accelerator.end_training()


def write_results(
    args: HarnessArguments, results: dict[str, Any], sources: list[TaskSource], metrics: dict[str, float]
) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))

    def to_json(value: object, **format: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **format) + "\n"

    samples = results.pop("samples", {})
    about = {"model": args.model_name_or_path, "limit": args.limit, "lm_eval_version": version("lm-eval")}
    lines = (to_json({"task": task, **sample}) for task, items in samples.items() for sample in items)
    args.write(to_json({**results, **about}, indent=2), "".join(lines))
    if args.update_model_card:
        update_model_card(args.model_name_or_path, task_results(sources, metrics))


if __name__ == "__main__":
    run_script(main)
