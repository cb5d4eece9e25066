"""Tasks of lm-evaluation-harness by name: groups, tags, patterns and classes, and those that no model here can do."""

import functools
import statistics
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from lm_eval.tasks import TaskManager
from support.generated_items import TEXT
from support.local_tasks import write_tasks
from transformers import AutoConfig, AutoModelForCausalLM

import eval_harness
import modeling_gpt2scratch  # noqa: F401  registers the model type
import train_accelerate
from pretraining.errors import UserError
from pretraining.evaluation import harness
from pretraining.evaluation.harness import load_tasks, metrics_of, run_tasks, sources_of
from pretraining.evaluation.harness_model import TreeLM
from pretraining.evaluation.hellaswag_items import hellaswag_source
from pretraining.publishing.model_card import RunRecord
from pretraining.records.metrics import is_of_hellaswag
from pretraining.records.task_results import TaskSource, task_results
from pretraining.tokenization.tokenizer import train_tokenizer

PYTHON_TASK = """
from lm_eval.api.task import ConfigurableTask

class Written(ConfigurableTask):
    DATASET_PATH = "json"

    def __init__(self, config=None):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def process_results(self, doc, results):
        return {"acc": 0.25}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of tasks, with a group, a tag, a task that is a class, and some that cannot be evaluated."""
    folder = tmp_path_factory.mktemp("tasks")
    files = write_tasks(folder)
    written = {name: yaml.safe_load(files[name].read_text()) for name in ("four", "letters", "writes")}

    def write(name: str, settings: dict, end: str = "") -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "task": name}) + end)

    for name in ("four", "letters"):
        write(name, {**written[name], "tag": "both"})
    figures = [{"metric": "acc", "weight_by_size": True}]
    group = {
        "group": "pair",
        "task": ["four", "letters"],
        "aggregate_metric_list": figures,
        "metadata": {"version": 1},
    }
    (folder / "pair.yaml").write_text(yaml.safe_dump(group))
    shots = {"group": "shots", "task": [{"task": "four", "num_fewshot": 2}]}
    (folder / "shots.yaml").write_text(yaml.safe_dump(shots))
    (folder / "written.py").write_text(PYTHON_TASK)
    write("written", written["four"], "class: !function written.Written\n")
    write("unsafe", {**written["writes"], "unsafe_code": True})
    write("pictures", {**written["writes"], "doc_to_image": ["page"]})
    write("collects", {**written["writes"], "metric_list": [{"metric": "bypass"}]})
    write("long", {**written["writes"], "generation_kwargs": {"until": ["\n"], "max_new_tokens": 64}})
    write("unlimited", {**written["writes"], "generation_kwargs": {"until": ["\n"]}})
    return folder


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch):
    """To list the harness's own 14,000 takes seconds."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def lm() -> TreeLM:
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2scratch", vocab_size=400, n_positions=256, n_embd=32, n_layer=1, n_head=2)
    return TreeLM(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer, batch_size=8, progress=False)


def test_a_group_has_one_result_over_all_its_items(folder, lm):
    tasks = load_tasks(["pair"], str(folder))
    results = run_tasks(lm, tasks, limit=5, log_samples=True)
    metrics, samples = metrics_of(results), [*results["samples"]["four"], *results["samples"]["letters"]]
    assert list(metrics) == ["pair_acc", "pair_acc_stderr"] and len(samples) == 10
    assert metrics["pair_acc"] == pytest.approx(statistics.mean(sample["acc"] for sample in samples))
    sources = {source.task: source for source in sources_of(tasks, limit=5)}
    assert {name: source.num_items for name, source in sources.items()} == {"four": 5, "letters": 5, "pair": 10}
    (result,) = task_results(list(sources.values()), metrics)
    assert (result.source.task, result.metric, result.value) == ("pair", "acc", metrics["pair_acc"])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["both"], {"four", "letters"}),
        (["l*"], {"letters", "last_word", "long"}),
        (["fou?", "letters", "four"], {"four", "letters"}),
        (["pair", "four"], {"four", "letters"}),
        (["written"], {"written"}),
    ],
)
def test_tags_patterns_and_classes_are_found(names, found, folder):
    assert set(load_tasks(names, str(folder)).tasks) == found


def test_a_task_that_is_a_class_is_evaluated_by_its_own_code(folder, lm):
    tasks = load_tasks(["written"], str(folder), num_fewshot=1)
    metrics = metrics_of(run_tasks(lm, tasks, limit=3))
    assert metrics["written_acc"] == 0.25
    (source,) = sources_of(tasks)
    assert (source.num_items, source.setting) == (7, "1-shot, lm-evaluation-harness")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unsafe"], "the task unsafe runs code that the model writes, which is not supported: leave it out"),
        (["pictures"], "the task pictures has images or sound, and the models here read text: leave it out"),
        (["collects"], "the task collects has no metric, it only collects answers: leave it out"),
        (
            ["shots", "four"],
            "the task four is given twice, with 0 and 2 examples before each item: give it once",
        ),
    ],
)
def test_what_no_model_here_can_do_is_told_when_the_tasks_are_loaded(names, message, folder):
    with pytest.raises(UserError) as error:
        load_tasks(names, str(folder))
    assert error.value.problems == (message,)
    if len(names) > 1:  # with one number for both they are the same
        assert set(load_tasks(names, str(folder), num_fewshot=2).tasks) == {"four"}


def test_texts_longer_than_the_model_are_told_before_anything_is_evaluated(folder, data_dir, tmp_path, refuse):
    tasks = load_tasks(["long", "unlimited", "four"], str(folder))
    assert tasks.problems(max_length=257) == []
    assert tasks.problems(max_length=256) == [
        "unlimited generates up to 256 tokens after its context, but the model has only 256 positions: leave it out"
    ]
    assert [problem.split()[0] for problem in tasks.problems(max_length=64)] == ["long", "unlimited"]
    training = ("--data_dir", data_dir, "--config_overrides", TINY, "--output_dir", tmp_path / "run")
    *_, line = refuse(train_accelerate, *training, "--eval_tasks", folder / "long.yaml")
    assert line.endswith(
        "--eval_tasks: long generates up to 64 tokens after its context, but the model has only 32 positions: "
        "leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_the_script_refuses_them_too(folder, lm, tmp_path, refuse):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    *_, line = refuse(eval_harness, "--model_name_or_path", tmp_path, "--tasks", folder / "unlimited.yaml")
    assert line.endswith("but the model has only 256 positions: leave it out")


def test_the_harness_s_hellaswag_is_not_taken_for_that_of_hellaswag_steps():
    """Both have the same keys."""
    ours, theirs = {"hellaswag_acc": 0.3, "hellaswag_n": 10}, {"hellaswag_acc": 0.2, "hellaswag_n": 10}
    theirs |= {"eval_tasks_n": 10}
    assert is_of_hellaswag(ours) and not is_of_hellaswag(theirs)
    own_source = hellaswag_source("Rowan/hellaswag", None, 10, "completion", is_whole=True)
    source = replace(own_source, setting="0-shot, lm-evaluation-harness", details={"task": "hellaswag"})
    empty = dict.fromkeys(field.name for field in fields(RunRecord))
    record = RunRecord(**{**empty, "tasks": theirs, "task_sources": [source]})
    assert record.hellaswag_results() == [] and [each.value for each in record.task_results()] == [0.2]
    record = RunRecord(**{**empty, "hellaswag": ours, "task_sources": [own_source]})
    assert record.task_results() == [] and [each.value for each in record.hellaswag_results()] == [0.3]


def test_results_on_another_number_of_items_are_left_out():
    """A run that was resumed with another limit has both kinds of lines in its metrics.jsonl."""
    source = TaskSource("piqa", "piqa", "baber/piqa", None, "validation", None, 100, False, "0-shot", {})
    metrics = {"piqa_acc": 0.6, "piqa_acc_stderr": 0.05}
    for values in (metrics, {**metrics, "piqa_n": 100}):
        (result,) = task_results([source], values)
        assert (result.metric, result.value, result.stderr) == ("acc", 0.6, 0.05)
    assert task_results([source], {**metrics, "piqa_n": 99}) == []
