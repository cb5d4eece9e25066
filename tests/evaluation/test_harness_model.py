"""Tasks through trees of tokens: the answers and figures of lm-evaluation-harness's own Hugging Face model."""

import copy
import io
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import script, succeed
from huggingface_hub import ModelCard, parse_eval_result_entries
from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.generated_items import TEXT
from support.hub_server import Hub
from support.local_tasks import write_tasks
from support.processes import run_ranks
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

import eval_harness
import modeling_gpt2scratch  # noqa: F401  registers the model type
import train_accelerate
from pretraining.errors import UserError
from pretraining.evaluation.harness import SMALL_LM, load_tasks, metrics_of, run_tasks
from pretraining.evaluation.harness_model import TreeLM
from pretraining.evaluation.loglikelihood import Continuation, token_tree
from pretraining.evaluation.prefix_groups import MAX_NODES, group_by_prefix, into_batches
from pretraining.tokenization.tokenizer import train_tokenizer

WINDOW = 256
SCORED = ["four", "letters", "contexts", "sentences", "last_word", "pages", "hellaswag_of_a_file"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=400)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def random_model(model_type: str, **kwargs):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.08}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 400}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **kwargs)).eval()


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2scratch", n_positions=WINDOW)


def near(values: dict) -> dict:
    """Perplexities differ relatively by what their logarithms differ absolutely."""
    return {
        key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in values.items()
    }


def assert_same_answers(found: dict, expected: dict) -> None:
    for task, samples in expected["samples"].items():
        for sample, other in zip(found["samples"][task], samples, strict=True):
            assert sample["arguments"] == other["arguments"]
            for (answer,), (reference,) in zip(sample["resps"], other["resps"], strict=True):
                if isinstance(answer, tuple):
                    assert answer[1] == reference[1], (task, sample["doc_id"])
                    answer, reference = answer[0], reference[0]
                # The harness adds up in fp32, of which a unit in the last place may be more.
                tolerance = max(1e-4, 2 * float(np.spacing(np.float32(abs(reference)))))
                assert answer == pytest.approx(reference, abs=tolerance), (task, sample["doc_id"])
    for task, values in expected["results"].items():
        assert found["results"][task] == near(values)


@pytest.mark.parametrize("num_fewshot", [0, 5])
@pytest.mark.parametrize("model_type", ["gpt2scratch", "gpt2", "llama", "mamba"])
def test_answers_and_figures_are_those_of_the_harness_s_own_model(model_type, num_fewshot, files, tokenizer, capsys):
    kwargs = {"n_positions": WINDOW} if "gpt2" in model_type else {}
    kwargs |= {"llama": {"intermediate_size": 64}, "mamba": {"state_size": 4}}.get(model_type, {})
    model = random_model(model_type, **kwargs)
    names = [name for name in SCORED if num_fewshot == 0 or name != "pages"]
    tasks = load_tasks([str(files[name]) for name in names], num_fewshot=num_fewshot)
    window = {"max_length": WINDOW}  # which not every config has
    found = run_tasks(TreeLM(model, tokenizer=tokenizer, batch_size=4, **window), tasks, log_samples=True)
    says_so = "this model does not see trees of tokens as it should" in capsys.readouterr().err
    assert says_so == (model_type == "mamba")
    for task in tasks.tasks.values():
        task.set_fewshot_seed(1234)
    lm = HFLM(model, tokenizer=tokenizer, batch_size=4, **window)
    expected = evaluate(lm, {"tasks": tasks.tasks}, bootstrap_iters=1000)
    assert_same_answers(found, expected)
    greedy = [answer[0][1] for sample in found["samples"]["last_word"] for answer in sample["resps"]]
    assert len(greedy) == 7


def test_a_greedy_answer_is_one(files, tokenizer):
    """What a model would write is greedy, and with another last token is not."""
    model = random_model("gpt2scratch", n_positions=WINDOW)
    lm = TreeLM(model, tokenizer=tokenizer, batch_size=4, progress=False)
    context = [5, 17, 300, 2]
    written = model.generate(
        torch.tensor([context]), do_sample=False, max_new_tokens=3, min_new_tokens=3, pad_token_id=0
    )
    ending = written[0, len(context) :].tolist()
    endings = [ending, ending[:1], [*ending[:-1], (ending[-1] + 1) % 400], [(ending[0] + 1) % 400, *ending[1:]]]
    answers = lm._loglikelihood_tokens([(None, context, each) for each in endings])
    assert [is_greedy for _, is_greedy in answers] == [True, True, False, False]


@pytest.mark.parametrize("add_bos_token", [None, True])
def test_a_tokenizer_s_begin_of_text_token_is_where_the_harness_puts_it(add_bos_token, files, tokenizer, model):
    tokenizer = copy.deepcopy(tokenizer)
    if add_bos_token is None:  # the tokenizer puts it there by itself
        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{pair[0]} $A", special_tokens=[pair])
        assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    tasks = load_tasks([str(files[name]) for name in ("four", "sentences", "pages")])
    settings = {"tokenizer": tokenizer, "batch_size": 4, "add_bos_token": add_bos_token}
    found = run_tasks(TreeLM(model, progress=False, **settings), tasks, log_samples=True)
    expected = evaluate(HFLM(model, **settings), {"tasks": tasks.tasks}, bootstrap_iters=1000)
    assert_same_answers(found, expected)


def test_of_tokens_that_are_equally_likely_the_one_that_the_harness_takes_is_greedy(tokenizer):
    model = random_model("gpt2scratch", n_positions=WINDOW, tie_word_embeddings=False)
    context = [5, 17, 300, 2]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
        twins = [likeliest, (likeliest + 7) % 400, (likeliest + 200) % 400]
        for twin in twins:
            model.lm_head.weight[twin] = model.lm_head.weight[likeliest]
    requests = [(None, context, [twin]) for twin in twins]
    found = TreeLM(model, tokenizer=tokenizer, batch_size=4, progress=False)._loglikelihood_tokens(requests)
    expected = HFLM(model, tokenizer=tokenizer, batch_size=4)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert sum(is_greedy for _, is_greedy in found) == 1


def test_a_window_that_only_the_deeper_tree_is_longer_than_is_found_out(tokenizer):
    """A wide tree of short requests is the largest one, and fits into the window of attention."""
    model = random_model("mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=32)
    wide = [(None, list(range(20)), [20 + number, 0]) for number in range(120)]
    deep = [(None, list(range(100, 160)), [number] * 3) for number in range(2)]
    settings = {"tokenizer": tokenizer, "batch_size": 4, "max_length": WINDOW}
    found = TreeLM(model, progress=False, **settings)._loglikelihood_tokens(wide + deep)
    expected = HFLM(model, **settings)._loglikelihood_tokens(wide + deep, disable_tqdm=True)
    assert [one for one, _ in found] == [pytest.approx(other, abs=1e-4) for other, _ in expected]


def test_standard_errors_of_filtered_answers_keep_their_name():
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.2}
    assert metrics_of({"results": {"t": values}}) == {
        "t_acc": 0.5,
        "t_acc_stderr": 0.1,
        "t_exact_match_strict": 0.25,
        "t_exact_match_strict_stderr": 0.2,
    }


def test_generated_texts_are_the_harness_s(files, tokenizer, model):
    tasks = load_tasks([str(files["writes"])])
    found = run_tasks(TreeLM(model, tokenizer=tokenizer, batch_size=3, progress=False), tasks, log_samples=True)
    expected = evaluate(HFLM(model, tokenizer=tokenizer, batch_size=3), {"tasks": tasks.tasks}, bootstrap_iters=10)
    texts = [[sample["resps"] for sample in each["samples"]["writes"]] for each in (found, expected)]
    assert texts[0] == texts[1] and any(text for ((text,),) in texts[0])


def test_what_items_share_is_computed_once(files, tokenizer):
    """Items behind the same five examples, with answers of one letter: the examples and each item are there once."""
    tasks = load_tasks([str(files["letters"])], num_fewshot=5)
    tasks.tasks["letters"].set_fewshot_seed(1234)
    tasks.tasks["letters"].build_all_requests(rank=0, world_size=1)
    requests = tasks.tasks["letters"].instances
    model, given = random_model("gpt2scratch", n_positions=1024), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: given.append(inputs[0].shape))
    lm = TreeLM(model, tokenizer=tokenizer, batch_size=8, progress=False)
    lm.largest_tree = lm.deepest_tree = math.inf  # what is found out about the model is found out
    try:
        lm.loglikelihood(requests)
    finally:
        hook.remove()
    encoded = [tokenizer.encode("".join(request.args))[:-1] for request in requests]
    beginnings = {tuple(tokens[:length]) for tokens in encoded for length in range(1, len(tokens) + 1)}
    assert len(requests) == 4 * 7 and given == [(1, len(beginnings))]
    assert len(beginnings) < sum(map(len, encoded)) / 12


def test_groups_have_every_continuation_once_and_branch_only_where_that_saves_work():
    shared = list(range(300))
    continuations = [Continuation(shared + [400 + number] * 20, 20) for number in range(5)]
    continuations += [Continuation([600 + number, *range(50)], 5) for number in range(5)]  # that share nothing
    continuations += [Continuation([7, 8, 700 + number] * 100, 1) for number in range(5)]  # that share two tokens
    continuations += [Continuation([9, 9, 9, letter], 1) for letter in range(4)]
    groups = group_by_prefix(continuations, hidden_size=64)
    assert sorted(index for group in groups for index in group) == list(range(len(continuations)))
    assert sorted(map(sorted, groups)) == [list(range(5)), *([index] for index in range(5, 15)), [15, 16, 17, 18]]
    chains = group_by_prefix(continuations, hidden_size=None)
    assert all(token_tree([continuations[index] for index in group]).is_chain for group in chains)
    assert sum(map(len, chains)) == len(continuations) and len(chains) == 16
    many = [Continuation(shared + [number] * 30, 30) for number in range(400, 700)]
    sizes = [len(token_tree([many[index] for index in group])) for group in group_by_prefix(many, hidden_size=768)]
    assert max(sizes) <= MAX_NODES and sum(sizes) < 300 * 329 / 6


def test_batches_hold_like_sizes_and_no_more_than_they_may():
    sizes = [3, 50, 7, 10, 10, 200, 9]
    batches = into_batches(sizes, max_tokens=100)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert [[sizes[index] for index in batch] for batch in batches] == [[200], [50, 10], [10, 9, 7, 3]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_and_three_processes_write_the_same_files(tmp_path, model_folder, files):
    written = {}
    for processes, name in ((1, "one"), (3, "three")):
        output = ("--output_file", tmp_path / name / "results.json", "--predictions_file", tmp_path / name / "items")
        tasks = ("--tasks", *(files[task] for task in ("four", "pages", "writes", "last_word")), "--limit", 5)
        arguments = ("--model_name_or_path", model_folder, *tasks, "--per_device_eval_batch_size", 3, *output)
        runs = [succeed(result) for result in run_ranks(processes, "eval_harness.py", *arguments)]
        assert [run.stdout.count("|four") for run in runs] == [1, 0, 0][:processes], "one process prints"
        assert "|acc_norm " in runs[0].stdout and "|word_perplexity|" in runs[0].stdout
        result = json.loads((tmp_path / name / "results.json").read_text())
        written[name] = result, [json.loads(line) for line in (tmp_path / name / "items").read_text().splitlines()]
    (result, samples), (other, other_samples) = written.values()
    counts = {task: sum(sample["task"] == task for sample in samples) for task in result["results"]}
    assert counts == {"four": 5, "pages": 3, "writes": 5, "last_word": 5}
    assert result["n-samples"]["four"] == {"original": 7, "effective": 5} and result["model"] == str(model_folder)
    assert len(samples) == len(other_samples)
    for sample, another in zip(samples, other_samples, strict=True):
        assert sample["arguments"] == another["arguments"]
        assert str(sample["resps"]) == str(another["resps"]) or sample["resps"] == [
            pytest.approx(response, abs=1e-4)
            if not isinstance(response[0], list)
            else [pytest.approx(response[0], abs=1e-4)]
            for response in another["resps"]
        ]
    for task, values in result["results"].items():
        assert other["results"][task] == near(values)


def test_the_harness_itself_builds_the_model_by_its_name(model_folder, files):
    manager = TaskManager(include_defaults=False)
    arguments = {"model_args": f"pretrained={model_folder},dtype=float32", "device": "cpu", "batch_size": 4}
    found = simple_evaluate("gpt2scratch_tree", tasks=[str(files["four"])], task_manager=manager, **arguments)
    expected = simple_evaluate("hf", tasks=[str(files["four"])], task_manager=manager, **arguments)
    assert_same_answers(found, expected)


def test_from_a_hub_and_back(tmp_path, model_folder, files):
    """The model and the items come from a Hub; the figures go into the model's card there, and its .eval_results."""
    table = pa.Table.from_pylist([json.loads(line) for line in (files["four"].parent / "items.jsonl").open()])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    settings = yaml.safe_load(files["four"].read_text()) | {"task": "ours", "dataset_path": "us/items"}
    del settings["dataset_kwargs"]
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(settings | {"fewshot_split": "validation"}))
    with Hub(token="secret") as hub:
        model = {path.name: path.read_bytes() for path in model_folder.iterdir()}
        hub.add("us/model", {**model, "README.md": b"---\nlicense: mit\n---\n# Ours\n"}, "model")
        commit = hub.add("us/items", {"data/validation-00000.parquet": buffer.getvalue()})
        how = ("--tasks", "ours", "--include_path", tmp_path, "--num_fewshot", 2)
        output = ("--output_file", tmp_path / "results.json", "--update_model_card")
        arguments = ("--model_name_or_path", "us/model", *how, *output)
        succeed(script("eval_harness.py", *arguments, **hub.environment(tmp_path / "me")))
        written = hub.files("us/model", "model")
    result = json.loads((tmp_path / "results.json").read_text())["results"]["ours"]
    entries = parse_eval_result_entries(yaml.safe_load(written[".eval_results/ours-2-shot.yaml"]))
    assert [entry.notes.split(",")[0] for entry in entries] == ["acc", "acc_norm"]
    card = ModelCard(written["README.md"].decode())
    for entry, other in zip(entries, card.data.eval_results, strict=True):
        metric = other.metric_type
        assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("us/items", "ours", commit)
        assert entry.value == other.metric_value == pytest.approx(result[f"{metric},none"], abs=1e-4)
        stderr = result[f"{metric}_stderr,none"]
        assert entry.notes == f"{metric}, 2-shot, lm-evaluation-harness, 7 items, standard error {stderr:.4f}"
        assert (other.dataset_type, other.dataset_revision, other.dataset_split) == ("us/items", commit, "validation")
        assert other.metric_args == {
            "task": "ours",
            "num_fewshot": 2,
            "lm_eval": version("lm-eval"),
            "n": 7,
            "stderr": pytest.approx(stderr, abs=1e-4),
        }


def test_mistakes_are_told_in_one_line_each(tmp_path, refuse, files, model, model_folder):
    lines = refuse(eval_harness, "--tasks", "x", "--limit", 0, "--num_fewshot", -1)
    assert [line.split(": ")[2].split()[0] for line in lines] == ["--model_name_or_path", "--limit", "--num_fewshot"]
    (line,) = refuse(
        eval_harness, "--model_name_or_path", model_folder, "--tasks", "x", "--include_path", tmp_path / "gone"
    )
    assert line.endswith(f"--include_path {tmp_path / 'gone'} is not a folder")
    (line,) = refuse(eval_harness, "--model_name_or_path", model_folder)
    assert line.endswith("--tasks is required: small_lm, or names of the harness's tasks")
    with pytest.raises(UserError) as error:
        load_tasks([*SMALL_LM, "hellaswagg", "piqa*_", str(files["four"])])
    assert [problem.split(" (")[0] for problem in error.value.problems] == [
        "lm-evaluation-harness has no task 'hellaswagg', did you mean hellaswag?",
        "lm-evaluation-harness has no task 'piqa*_', did you mean piqa?",
    ]
    (tmp_path / "missing.yaml").write_text(files["four"].read_text().replace("items.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match=r"the task .*missing.yaml cannot be loaded: .*gone.jsonl") as error:
        load_tasks([str(tmp_path / "missing.yaml")])
    assert len(error.value.problems) == 1
    model.save_pretrained(tmp_path / "bare")
    *_, line = refuse(eval_harness, "--model_name_or_path", tmp_path / "bare", "--tasks", files["four"])
    assert "error: the tokenizer" in line and str(tmp_path / "bare") in line


def test_without_the_harness_one_line_tells_how_to_install_it(refuse, monkeypatch, model_folder, files, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    (line,) = refuse(eval_harness, "--model_name_or_path", model_folder, "--tasks", files["four"])
    assert line.endswith("lm-evaluation-harness is not installed: pip install lm-eval")
    training = ("--data_dir", tmp_path, "--output_dir", tmp_path / "run", "--eval_tasks")
    (line,) = refuse(train_accelerate, *training, files["four"])
    assert line.endswith("--eval_tasks: lm-evaluation-harness is not installed, pip install lm-eval")
    (line,) = refuse(train_accelerate, *training[:-1], "--eval_tasks_limit", 5)
    assert line.endswith("--eval_tasks_limit is for --eval_tasks: give both")


def test_weights_that_are_not_finite_are_an_error(files, tokenizer):
    model = random_model("gpt2scratch", n_positions=WINDOW)
    model.lm_head.weight.data[0] = math.nan
    lm = TreeLM(model, tokenizer=tokenizer, batch_size=4, progress=False)
    with pytest.raises(UserError, match="log-likelihoods are not finite"):
        run_tasks(lm, load_tasks([str(files["last_word"])]))
