"""HellaSwag as lm-evaluation-harness itself scores it, with its own task."""

from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.generated_items import TEXT, generated_records, write_items
from transformers import GPT2Config, GPT2LMHeadModel

from pretraining.evaluation.harness_model import TreeLM
from pretraining.evaluation.hellaswag_items import encode_items, load_items
from pretraining.evaluation.hellaswag_scoring import can_be_trees, score_items, summarise
from pretraining.tokenization.tokenizer import train_tokenizer

WINDOW = 96


def test_every_item_and_every_figure_is_the_harness_s(tmp_path):
    data_file = write_items(tmp_path / "items.jsonl", generated_records(19))
    items = load_items(data_file)
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    torch.manual_seed(0)
    shape = {"n_positions": WINDOW, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()

    settings = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"),
        "task": "hellaswag_of_a_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data_file)}, "cache_dir": str(tmp_path / "cache")},
        "training_split": None,
    }
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump(settings))
    manager = TaskManager(include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7)
    answer = simple_evaluate(lm, tasks=[str(task)], task_manager=manager, bootstrap_iters=2)
    samples, figures = (answer[kind]["hellaswag_of_a_file"] for kind in ("samples", "results"))

    trees = TreeLM(model, tokenizer=tokenizer, batch_size=3, progress=False)
    through_trees = simple_evaluate(trees, tasks=[str(task)], task_manager=manager, bootstrap_iters=2)
    samples_of_trees = through_trees["samples"]["hellaswag_of_a_file"]
    assert through_trees["results"]["hellaswag_of_a_file"] == figures

    encoded = encode_items(model.config, tokenizer, items, "lm_eval")
    scores = score_items(model, encoded, batch_size=5, as_trees=can_be_trees(model, encoded))
    assert any(item.is_cut for item in encoded) and not all(item.is_cut for item in encoded)
    for sample, tree_sample, score in zip(samples, samples_of_trees, scores, strict=True):
        sums = [float(response[0]) for response in sample["filtered_resps"]]
        assert score["loglikelihoods"] == pytest.approx(sums, abs=1e-4)
        tree_sums = [response[0] for response in tree_sample["filtered_resps"]]
        assert score["loglikelihoods"] == pytest.approx(tree_sums, abs=1e-4)
        assert (score["pred"] == score["label"]) == sample["acc"]
        assert (score["pred_norm"] == score["label"]) == sample["acc_norm"]
    summary = summarise(encoded, scores, "lm_eval")
    assert {name: figures[f"{name},none"] for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")} == {
        name: pytest.approx(value) for name, value in summary.items() if name.startswith("acc")
    }
