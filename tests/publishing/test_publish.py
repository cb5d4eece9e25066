"""What is trained here goes to the Hub whole, and only what belongs there; and it is at home there."""

import ast
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import REPOSITORY, TINY, metrics, run, script, succeed, train, warnings_in
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load
from support import processes
from support.generated_items import generated_records, write_items
from support.hub_server import Hub
from support.tiny_models import randomise, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

import publish_model
import train_accelerate
from modeling_gpt2scratch import GPT2ScratchConfig
from pretraining.checkpoints.folders import complete_checkpoints, verify
from pretraining.cli import run_script
from pretraining.data.training_data import open_packed
from pretraining.distributed.signals import STOPPED
from pretraining.evaluation.hellaswag_items import hellaswag_source
from pretraining.publishing.card_edits import converted_card, renamed_card
from pretraining.publishing.model_card import RunCard, RunRecord, model_card
from pretraining.publishing.push import published
from pretraining.records.task_results import TaskSource
from pretraining.training.flags import TrainArguments

CODE = {
    "modeling_gpt2scratch.py",
    "configuration_gpt2scratch.py",
    "document_mask.py",
    "linear_cross_entropy.py",
    "one_dnn.py",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
WHOLE = {"config.json", "generation_config.json", "model.safetensors", "README.md", *CODE, *TOKENIZER}
TOKEN = "hf_secret"
# One that the run below has learnt to go on from.
PROMPT = "def apple("
# Of 10,042 items, with the standard errors that the harness has for such accuracies.
HELLASWAG = {"n": 10042, "acc": 0.29, "acc_stderr": 0.004528, "acc_norm": 0.31, "acc_norm_stderr": 0.004615}


@pytest.fixture(scope="module")
def items_file(tmp_path_factory) -> Path:
    # Short ones: the model has 32 positions.
    records = [{**record, "ctx": "A man"} for record in generated_records(8)]
    return write_items(tmp_path_factory.mktemp("hellaswag") / "items.jsonl", records)


@pytest.fixture(scope="module")
def run_dir(data_dir, items_file, tmp_path_factory) -> Path:
    """A finished run, with what a run folder may hold besides."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    arguments = (
        "--max_steps",
        120,
        "--save_steps",
        60,
        "--eval_steps",
        60,
        "--optim",
        "muon",
        "--learning_rate",
        2e-2,
    )
    arguments += ("--hellaswag_steps", 60, "--hellaswag_file", items_file, "--sample_prompts", PROMPT)
    succeed(train(data_dir, folder, *arguments))
    (folder / "wandb").mkdir()
    (folder / "wandb/config.yaml").write_text(f"token: {TOKEN}")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """`use_hub(hub)`: this process's client knows that Hub alone, as it would have if it had been started so."""

    def use(hub: Hub, token: str = TOKEN) -> None:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        constants = huggingface_hub.constants
        for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)

    return use


@pytest.fixture
def publish(monkeypatch, capfd):
    """`publish(*arguments)`: exit status, and what publish_model.py says on stdout and stderr. In this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["publish_model.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            run_script(publish_model.main)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return call


def titles(hub: Hub, repo_id: str) -> list[str]:
    return [commit.title for commit in hub.repositories["model", repo_id].commits]


def weights_sent(hub: Hub) -> int:
    return sum(method == "PUT" and status == 200 for method, _, _, status in hub.requests)


def assert_nothing_private(files: dict[str, bytes], *secrets: object) -> None:
    for name, content in files.items():
        for secret in (TOKEN, *map(str, secrets)):
            assert secret.encode() not in content, f"{name} tells {secret}"


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.M | re.S)


def greedy(folder: Path) -> str:
    """The prompt, and what the model's greedy decoding writes after it, in a plain loop without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        while ids.shape[1] < model.config.n_positions:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0])


def piped(folder: Path) -> str:
    """What a pipeline, which samples, writes after the prompt with the model's own class and the seed 0."""
    generator = pipeline("text-generation", model=str(folder))
    set_seed(0)
    return generator(PROMPT, max_new_tokens=16)[0]["generated_text"]


def test_checkpoints_are_published_while_training_goes_on(data_dir, items_file, tmp_path):
    """And on a machine without this repository, what the card says works, for any of the commits."""
    arguments = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY)
    arguments += ("--max_steps", 30, "--save_steps", 5, "--save_total_limit", 1, "--eval_steps", 10)
    arguments += ("--logging_steps", 1, "--learning_rate", 3e-3, "--sample_prompts", PROMPT, "--license", "cc-by-4.0")
    arguments += ("--push_to_hub", "--hub_model_id", "model", "--hub_strategy", "checkpoint", "--hub_private_repo")
    arguments += ("--hellaswag_steps", 5)
    scores, plot = ".eval_results/hellaswag-completion-protocol.yaml", "plots/hellaswag.png"
    with Hub(token=TOKEN) as hub:
        hub.add("Rowan/hellaswag", {"validation.jsonl": items_file.read_bytes()})
        with hub.hold("/storage/"):  # the first checkpoint is on its way for as long as the test wants
            running = processes.start("train_accelerate.py", *arguments, **hub.environment(tmp_path / "me"))
            log = tmp_path / "run/metrics.jsonl"
            processes.wait_until(
                lambda: log.is_file() and any(line.get("step", 0) >= 20 for line in metrics(log.parent)), 120
            )
            assert titles(hub, "tester/model") == ["initial commit"]
            assert not (tmp_path / "run/checkpoint-000005").exists()  # rotated away, and yet it arrives
        result = succeed(running.wait())
        output, errors = result.stdout, result.stderr
        assert "published as tester/model, revision " in output and "step 5 is published as tester/model" in output
        assert warnings_in(output + errors) == []
        assert hub.repositories["model", "tester/model"].private
        first, *_, last = titles(hub, "tester/model")[1:]
        assert (first, last) == ("Step 5", "Trained by gpt2scratch")
        _, at_5, *_, final = hub.commits("tester/model", "model")
        early = hub.files("tester/model", "model", revision=at_5)
        late = hub.files("tester/model", "model", revision=final)
        assert set(early) == WHOLE | {scores, plot} and set(late) == WHOLE | {scores, plot, "plots/loss.png"}
        lines = {line["step"]: line for line in metrics(tmp_path / "run") if "hellaswag_n" in line}
        for step, files in ((5, early), (30, late)):
            entries = parse_eval_result_entries(yaml.safe_load(files[scores]))
            assert [entry.value for entry in entries] == [
                pytest.approx(lines[step][f"hellaswag_{metric}"], abs=1e-4) for metric in ("acc", "acc_norm")
            ]
            assert entries[0].dataset_id == "Rowan/hellaswag" and "8 items" in entries[0].notes
        assert_nothing_private({**early, **{f"late {name}": file for name, file in late.items()}}, tmp_path, data_dir)
        for name in WHOLE - {"README.md"}:
            assert late[name] == (tmp_path / "run" / name).read_bytes(), name
        assert {name for name in WHOLE if early[name] != late[name]} == {"model.safetensors", "README.md"}
        assert not list((tmp_path / "run").glob("*.incomplete"))
        card = early["README.md"].decode()
        assert "So far 5 of 30 steps." in card and "license: cc-by-4.0" in card and "Not evaluated yet." in card
        assert "So far" not in late["README.md"].decode()

        program = f"""
import importlib.util, json, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("modeling_gpt2scratch") is None
for revision in ({at_5!r}, {final!r}):
    model = AutoModelForCausalLM.from_pretrained("tester/model", revision=revision, trust_remote_code=True)
    base = AutoModel.from_pretrained("tester/model", revision=revision, trust_remote_code=True)
    assert type(base).__name__ == "GPT2ScratchModel"
    print(json.dumps([weight.sum().item() for weight in model.parameters()]))
import contextlib
from accelerate.commands import estimate
command = ["tester/model", "--library_name", "transformers", "--trust_remote_code", "--dtypes", "float32"]
with contextlib.redirect_stdout(None):
    estimated = estimate.gather_data(estimate.estimate_command_parser().parse_args(command))
print(json.dumps(estimated))
transformers.set_seed(0)
exec(compile({code_blocks(late["README.md"].decode())[0]!r}, "card", "exec"))
"""
        elsewhere = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", **hub.environment(tmp_path / "you")}
        lines = succeed(run(sys.executable, "-c", program, cwd=tmp_path, **elsewhere)).stdout.splitlines()
    for line, files in zip(lines, (early, late), strict=False):
        weights = load(files["model.safetensors"]).values()
        assert sorted(json.loads(line)) == pytest.approx(sorted(each.sum().item() for each in weights), abs=1e-4)
    assert lines[0] != lines[1]
    # accelerate estimate-memory: four bytes a parameter, and the head by itself, as its empty weights are not tied.
    ((dtype, _, size, _),) = json.loads(lines[2])
    head = 320 * 32
    assert (dtype, size) == ("float32", 4 * (sum(each.numel() for each in weights) + head))
    assert "\n".join(lines[3:]).strip() == piped(tmp_path / "run").strip()


def test_a_token_that_may_not_write_is_told_before_training(data_dir, tmp_path, use_hub, refuse):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY)
    with Hub(token=TOKEN) as hub:
        use_hub(hub, token="hf_other")
        (line,) = refuse(train_accelerate, *flags, "--push_to_hub", "--hub_model_id", "us/model")
    assert line.startswith("train_accelerate.py: error: --push_to_hub us/model failed: ") and "401" in line
    assert not (tmp_path / "run").exists()


def test_what_the_hub_refuses_is_told_before_training(data_dir, tmp_path, use_hub, refuse):
    """A token that may only read a repository that is there; a public one where a private one is asked for; a name."""
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY, "--push_to_hub")
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        hub.add("us/model", {"README.md": b"# Ours\n"}, "model")
        hub.fail(times=1, status=403, matching="/api/repos/create")
        hub.fail(times=1, status=403, matching="/auth-check/write")
        (line,) = refuse(train_accelerate, *flags, "--hub_model_id", "us/model")
        assert "--push_to_hub us/model failed: " in line and "403" in line
        (line,) = refuse(train_accelerate, *flags, "--hub_model_id", "us/model", "--hub_private_repo")
        assert "--push_to_hub us/model failed: it is there, and public: leave --hub_private_repo out" in line
        hub.fail(times=1, status=400, matching="/api/validate-yaml")
        (line,) = refuse(train_accelerate, *flags, "--hub_model_id", "us/model", "--license", "gpl")
        assert "--push_to_hub us/model failed: " in line
        (line,) = refuse(train_accelerate, *flags, "--hub_model_id", "a/b/c")
        assert "--push_to_hub a/b/c failed: Repo id must" in line
        assert len(hub.commits("us/model", "model")) == 1
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_published_by_a_command(run_dir, data_dir, use_hub, publish):
    with Hub(token=TOKEN) as hub:
        use_hub(hub, token="hf_other")
        command = ("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
        status, _, errors = publish(*command)
        assert status == 2 and errors.startswith("publish_model.py: error: --push_to_hub us/model failed: ")
        assert "401" in errors and "a token that may write" in errors and errors.count("\n") == 1
        assert not hub.repositories

        use_hub(hub)
        hub.fail(times=1, status=500, matching="/commit/")  # when the weights are there already
        status, _, errors = publish(*command)
        assert status == 2 and errors.count("\n") == 1 and "--push_to_hub us/model failed: " in errors
        assert titles(hub, "us/model") == ["initial commit"] and weights_sent(hub) == 1  # those of the branch gpt2

        status, output, errors = publish(*command, "--license", "odc-by")
        assert (status, errors) == (0, "") and output.startswith("published as us/model, revision ")
        assert weights_sent(hub) == 2  # and now those of main
        assert hub.commits("us/model", "model")[-1] in output
        files = hub.files("us/model", "model")
        assert set(files) == WHOLE | {"plots/loss.png", "plots/hellaswag.png"}
        assert_nothing_private(files, run_dir, data_dir)
        card = files["README.md"].decode()
        assert "# model\n" in card and 'model="us/model"' in card
        assert "license: odc-by" in card and "The weights: `odc-by`." in card
        assert f'model="{run_dir}"' in (run_dir / "README.md").read_text()  # which stays as it is


def test_a_checkpoint_that_cannot_be_published_stops_nothing(data_dir, tmp_path):
    """On two processes, of which the first one publishes."""
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY, "--max_steps", 5)
    flags += ("--save_steps", 2, "--push_to_hub", "--hub_model_id", "us/model", "--hub_strategy", "checkpoint")
    with Hub(token=TOKEN) as hub:
        hub.fail(times=1, status=403, matching="/commit/")
        result, other = processes.run_ranks(2, "train_accelerate.py", *flags, **hub.environment(tmp_path / "me"))
        assert succeed(other).stdout == "" and succeed(result)
        assert "warning: --push_to_hub us/model failed: " in result.stdout
        assert "step 2 is not published, training goes on" in result.stdout
        assert titles(hub, "us/model")[-1] == "Trained by gpt2scratch"
        folders = complete_checkpoints(tmp_path / "run")
        assert len(folders) == 2 and not any(verify(folder) for folder in folders)  # what is published is a copy
        assert "| hardware | 2 processes, CPU" in hub.files("us/model", "model")["README.md"].decode()


def test_the_final_model_is_published_after_the_checkpoint_that_is_on_its_way(data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY, "--max_steps", 3)
    flags += ("--save_steps", 2, "--push_to_hub", "--hub_model_id", "us/model", "--hub_strategy", "checkpoint")
    with Hub(token=TOKEN) as hub:
        with hub.hold("/commit/"):
            running = processes.start("train_accelerate.py", *flags, **hub.environment(tmp_path / "me"))
            processes.wait_until(lambda: (tmp_path / "run/model.safetensors").exists())
            time.sleep(1)
            assert sum("/preupload/" in path for _, path, *_ in hub.requests) == 1
        succeed(running.wait())
        assert titles(hub, "us/model") == ["initial commit", "Step 2", "Trained by gpt2scratch"]


def test_a_push_that_was_killed_goes_on_where_it_was(run_dir, tmp_path):
    command = ("publish_model.py", "--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
    with Hub(token=TOKEN) as hub:
        environment = hub.environment(tmp_path / "me")
        with hub.hold("/commit/"):
            running = processes.start(*command, **environment)
            processes.wait_until(lambda: weights_sent(hub) == 1)
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        assert titles(hub, "us/model") == ["initial commit"]
        assert "published as us/model, revision " in succeed(script(*command, **environment)).stdout
        assert weights_sent(hub) == 2  # those of the branch gpt2 before, those of main now
        assert hub.files("us/model", "model")["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()


def test_a_run_that_is_stopped_while_it_publishes_does_not_wait(data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config_overrides", TINY, "--max_steps", 2)
    command = ("train_accelerate.py", *flags, "--push_to_hub", "--hub_model_id", "us/model")
    with Hub(token=TOKEN) as hub:
        environment = hub.environment(tmp_path / "me")
        with hub.hold("/storage/"):
            running = processes.start(*command, **environment)
            processes.wait_until(lambda: hub.awaited != set())
            os.kill(running.pid, signal.SIGTERM)
            stopped = running.wait()
        assert stopped.returncode == STOPPED
        assert "stopped by SIGTERM before it was published: the same command does that" in stopped.stderr
        assert "published as us/model, revision " in succeed(script(*command, **environment)).stdout
        assert titles(hub, "us/model") == ["initial commit", "Trained by gpt2scratch"]


def test_the_card_tells_the_run_from_its_records(run_dir):
    card = ModelCard.load(run_dir / "README.md")
    lines = metrics(run_dir)
    evaluation = [line for line in lines if "eval_loss" in line][-1]
    hellaswag = [line for line in lines if "hellaswag_n" in line][-1]
    entries = {entry.metric_type: entry for entry in card.data.eval_results}
    assert entries["loss"].metric_value == pytest.approx(evaluation["eval_loss"], abs=1e-4)
    assert entries["perplexity"].metric_value == pytest.approx(math.exp(evaluation["eval_loss"]), abs=1e-3)
    assert entries["bits_per_byte"].metric_value == pytest.approx(evaluation["eval_bits_per_byte"], abs=1e-4)
    for metric in ("acc", "acc_norm"):
        share, n = hellaswag[f"hellaswag_{metric}"], 8
        hits = [1.0] * round(share * n) + [0.0] * (n - round(share * n))
        variance = sum((hit - share) ** 2 for hit in hits) / (n - 1)
        entry = entries[metric]
        assert entry.metric_value == pytest.approx(share, abs=1e-4)
        assert entry.metric_args["n"] == n
        assert entry.metric_args["stderr"] == pytest.approx(math.sqrt(variance / n), abs=1e-4)
        assert f"| `{metric}` | {share:.4f} ± {math.sqrt(variance / n):.4f} |" in card.text
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run_dir).parameters())
    info = json.loads((run_dir / "identity.json").read_text())
    for expected in (
        f"{parameters:,}",
        "documents.jsonl, revision ",
        f"{120 * info['tokens_per_step']:,} (",  # tokens seen
        "| `learning_rate` | 0.02 |",
        f"{evaluation['eval_loss']:.4f}",
        "(plots/loss.png)",
        "(plots/hellaswag.png)",
        f"torch {torch.__version__}",
        "## Limits",
        "## Licence",
        "1 process, CPU",
    ):
        assert expected in card.text, expected
    number, unit = re.search(r"\| time \| ([\d.]+) (seconds|minutes)", card.text).groups()
    assert float(number) * (60 if unit == "minutes" else 1) > lines[-1]["elapsed_seconds"] - 6  # to 0.1 minutes


def test_results_on_a_dataset_of_the_hub_are_published_where_the_hub_reads_them(run_dir, data_dir, tmp_path):
    arguments = TrainArguments(data_dir=str(data_dir), output_dir=str(run_dir), max_steps=120)
    accelerator = Accelerator(cpu=True)
    data, config = open_packed(arguments.sources(), None, None, accelerator.state), AutoConfig.from_pretrained(run_dir)
    for dataset, is_whole in (("Rowan/hellaswag", True), ("Rowan/hellaswag", False), ("items.jsonl", True)):
        source = hellaswag_source(dataset, "c0ffee", 8, "completion", is_whole)
        folder = tmp_path / f"{is_whole}-{Path(dataset).name}"
        folder.mkdir()
        RunCard(arguments, accelerator, data, config, 1, 128, None, [source]).write(folder, 120, 90.0)
        names = [str(path.relative_to(folder)) for path in published(folder)]
        is_for_the_hub = is_whole and "/" in dataset
        assert names == ([".eval_results/hellaswag-completion-protocol.yaml"] if is_for_the_hub else [])
        assert any(entry.dataset_type == dataset for entry in ModelCard.load(folder / "README.md").data.eval_results)
    entries = yaml.safe_load(
        (tmp_path / "True-hellaswag/.eval_results/hellaswag-completion-protocol.yaml").read_text()
    )
    line = [line for line in metrics(run_dir) if "hellaswag_n" in line][-1]
    assert [entry["value"] for entry in entries] == [
        pytest.approx(line[f"hellaswag_{metric}"], abs=1e-4) for metric in ("acc", "acc_norm")
    ]


def test_the_card_of_a_checkpoint_knows_nothing_of_what_came_after_it(run_dir, data_dir):
    arguments = TrainArguments(data_dir=str(data_dir), output_dir=str(run_dir), max_steps=120)
    accelerator = Accelerator(cpu=True)
    data = open_packed(arguments.sources(), None, None, accelerator.state)
    config = AutoConfig.from_pretrained(run_dir)
    card = RunCard(arguments, accelerator, data, config, parameters=1, tokens_per_step=128, repo_id=None)
    text = model_card(card.record_at(60, 90.0), config).text
    assert "| time | 90 seconds |" in text
    (loss,) = (line["eval_loss"] for line in metrics(run_dir) if line["step"] == 60 and "eval_loss" in line)
    assert f"| loss, nats per token | {loss:.4f} |" in text and ", after step" not in text
    assert "So far 60 of 120 steps." in text and "| tokens seen | 7,680 (" in text


def test_the_card_of_a_model_of_hub_data_trained_further_on_a_stream():
    """No local path; the data and the model that it began with as metadata; a part of the evaluation text named."""
    record = RunRecord(
        name="us/model",
        parameters=10,
        step=50,
        max_steps=100,
        tokens=5000,
        hours=30.0,
        hardware="8 x NVIDIA H100 80GB HBM3",
        mixed_precision="bf16",
        license="odc-by",
        settings={"model_name_or_path": "openai-community/gpt2", "learning_rate": 6e-4},
        sources=[
            {"name": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": "abc", "share": 0.75},
            {"name": "mine.jsonl", "revision": "def", "share": 0.25},
        ],
        train_statistics=None,
        validation_statistics={"documents": 3, "tokens": 900, "bytes": 4000},
        evaluation={"step": 40, "eval_loss": 3.5, "eval_perplexity": math.exp(3.5), "eval_bits_per_byte": 1.1},
        eval_tokens=600,
        hellaswag={"step": 50, **{f"hellaswag_{key}": value for key, value in HELLASWAG.items()}},
        tasks={"step": 50, "piqa_acc": 0.6, "piqa_acc_stderr": 0.01, "eval_tasks_n": 1838},
        task_sources=[
            hellaswag_source("Rowan/hellaswag", "c0ffee", 10042, "completion", is_whole=True),
            TaskSource("piqa", "piqa", "baber/piqa", None, "validation", "beef", 1838, True, "0-shot, harness", {}),
        ],
        compression={},
        prompts=["", "x" * 600, 'He said "'],
        samples=["```\ncode\n```"],
        versions={"torch": "2.13.0"},
    )
    card = ModelCard(str(model_card(record, GPT2ScratchConfig())))
    assert card.data.datasets == ["HuggingFaceFW/fineweb-edu"] and card.data.base_model == "openai-community/gpt2"
    by_type = {entry.metric_type: entry for entry in card.data.eval_results}
    assert by_type["acc_norm"].dataset_revision == "c0ffee" and by_type["acc"].dataset_type == "baber/piqa"
    assert by_type["acc_norm"].dataset_type == "Rowan/hellaswag" and by_type["acc_norm"].dataset_split == "validation"
    assert by_type["acc_norm"].metric_args["stderr"] == pytest.approx(0.0046)  # as the harness has it for 10,042
    for expected in (
        "So far 50 of 100 steps.",
        "trained further from `openai-community/gpt2`",
        "75.0% of the rows: HuggingFaceFW/fineweb-edu, sample-10BT, revision abc",
        "25.0% of the rows: mine.jsonl, revision def",
        "| tokens seen | 5,000 |",
        "On the first 600 tokens of 4,000 bytes of text (3 documents) not trained on, after step 40:",
        "On 10,042 items of HellaSwag (Rowan/hellaswag, ",
        "0.3100 ± 0.0046",
        "| piqa, 0-shot | `acc` | 0.6000 ± 0.0100 | 1,838 |",
        "30.0 hours",
        "````text\n```\ncode\n```\n````",
    ):
        assert expected in card.text, expected
    assert 'generator("He said \\"", max_new_tokens=60)' in card.text  # the first prompt that leaves room
    # A folder of an awkward name, under which the model is converted, and published.
    folder = 'a "b" \\t'
    for format in ("gpt2", "gguf", "onnx"):
        converted = converted_card(str(card), Path(folder), format, GPT2ScratchConfig())
        for each in (converted, renamed_card(str(converted), "us/other", None)):
            for block in code_blocks(str(each)):
                ast.parse(block)
        assert "us/model" not in each.text and folder not in each.text and "us/other" in each.text
        assert "He said" in each.text
    local = replace(record, settings={"model_name_or_path": str(REPOSITORY)})
    assert str(REPOSITORY.parent) not in str(model_card(local, GPT2ScratchConfig()))


@pytest.fixture(scope="module")
def converted(run_dir, tmp_path_factory):
    """`converted(format)`: the run in that format, written by the command, once."""
    folders = {}

    def call(publish, format: str, *arguments: object) -> Path:
        if format not in folders:
            folder = tmp_path_factory.mktemp("converted") / format
            command = ("--model_name_or_path", run_dir, "--format", format, "--output_dir", folder, *arguments)
            status, output, errors = publish(*command)
            assert status == 0, errors
            assert output.endswith(f"written as {folder}\n") and not errors
            folders[format] = folder
        return folders[format]

    return call


@pytest.mark.parametrize("format", ["gpt2", "gguf", "onnx"])
def test_what_the_card_of_another_format_says_writes_the_same_text(format, run_dir, converted, publish, capfd):
    folder = converted(publish, format)
    card = ModelCard.load(folder / "README.md")
    assert "trust_remote_code" not in card.text and "## Evaluation" in card.text
    assert ", in f32. The figures below were measured before that." in card.text
    assert card.data.eval_results  # those of the run
    assert (folder / "plots/loss.png").is_file()
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}
    assert_nothing_private(files, REPOSITORY, run_dir, folder)
    capfd.readouterr()
    set_seed(0)
    exec(compile(code_blocks(card.text)[0], "card", "exec"), {})
    text = capfd.readouterr().out.strip()
    assert len(text) > len(PROMPT) + 5
    if format == "onnx":
        assert greedy(run_dir).startswith(text)
    else:
        assert text == piped(run_dir).strip()


def test_the_stock_model_needs_no_code_and_computes_the_same(run_dir, converted, publish):
    folder = converted(publish, "gpt2")
    assert {path.name for path in folder.iterdir()} == WHOLE - CODE | {"plots"}
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert_same_logits(lambda ids: stock(ids).logits, run_dir)


def test_the_gguf_file_holds_the_same_numbers_and_the_same_tokenizer(run_dir, converted, publish, tmp_path):
    ours = AutoTokenizer.from_pretrained(run_dir)
    text = "def apple(kettle):\n    return  'wörld'\n\n<|endoftext|> 12 日本"
    for outtype, tolerance in (("f32", 1e-5), ("f16", 0.05), ("bf16", 0.2), ("q8_0", 0.5)):
        folder = converted(publish, "gguf")
        if outtype != "f32":
            folder = tmp_path / outtype
            command = ("--model_name_or_path", run_dir, "--format", "gguf", "--output_dir", folder)
            assert publish(*command, "--outtype", outtype)[0] == 0
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", n_positions=32)
        theirs = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert theirs(text).input_ids == ours(text).input_ids
        assert_same_logits(lambda ids, model=model: model(ids).logits, run_dir, tolerance)
    sizes = [(folder / "model.gguf").stat().st_size for folder in (converted(publish, "gguf"), tmp_path / "q8_0")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {"n_inner": 40, "qkv_bias": False}], ids=str)
def test_a_model_of_another_kind_in_every_format(changes, run_dir, tmp_path, publish, capfd):
    """A head of its own; a narrower network; more tokens than the tokenizer has."""
    model = tiny_model(vocab_size=330, n_positions=32, **changes)
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(run_dir).save_pretrained(tmp_path / "model")
    for format in ("gpt2", "gguf"):
        command = ("--model_name_or_path", tmp_path / "model", "--format", format, "--output_dir", tmp_path / format)
        assert publish(*command, "--license", "apache-2.0")[0] == 0
        assert ModelCard.load(tmp_path / format / "README.md").data.license == "apache-2.0"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert_same_logits(lambda ids: stock(ids).logits, tmp_path / "model")
    names = {}
    exec(compile(code_blocks((tmp_path / "gguf/README.md").read_text())[0], "card", "exec"), names)
    assert_same_logits(lambda ids: names["model"](ids).logits, tmp_path / "model")


def test_llama_cpp_reads_the_gguf_file(run_dir, converted, publish):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is compiled for minutes: install it by hand")
    path = converted(publish, "gguf") / "model.gguf"
    llama = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False)
    text = "def apple(kettle):\n    return 'wörld'"
    ids = AutoTokenizer.from_pretrained(run_dir)(text).input_ids
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
    llama.eval(ids)
    logits = torch.tensor(llama.scores[: len(ids)])
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], rtol=0, atol=0.02)  # its cache is f16
    completion = llama.create_completion(PROMPT, max_tokens=10, temperature=0)["choices"][0]["text"]
    assert greedy(run_dir).startswith(PROMPT + completion)
    llama.close()


def test_the_onnx_graph_reads_any_batch_with_padding_and_goes_on_from_its_cache(run_dir, converted, publish):
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(converted(publish, "onnx") / "onnx/model.onnx")
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    heads, width = model.config.n_head, model.config.n_embd // model.config.n_head
    names = [each.name for each in session.get_inputs()]
    assert names[:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    # transformers.js looks for this name where it makes an empty cache.
    assert session.get_inputs()[3].shape == ["batch_size", heads, "past_sequence_length", width]

    def forward(ids, mask, positions, past):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: tensor.numpy() for name, tensor in inputs.items()}
        logits, *present = session.run(None, inputs | dict(zip(names[3:], past, strict=True)))
        return torch.from_numpy(logits), present

    def nothing(batch_size):
        return [np.zeros((batch_size, heads, 0, width), np.float32)] * len(names[3:])

    generator = torch.Generator().manual_seed(0)
    for batch_size, length in ((1, 1), (3, 7), (2, 32)):
        ids = torch.randint(1, 320, (batch_size, length), generator=generator)
        positions = torch.arange(length).repeat(batch_size, 1)
        logits, _ = forward(ids, torch.ones_like(ids), positions, nothing(batch_size))
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=2e-5)
    ids = torch.randint(1, 320, (2, 12), generator=generator)
    past, pieces, start = nothing(2), [], 0
    for piece in ids.split([5, 1, 6], dim=1):
        end = start + piece.shape[1]
        positions = torch.arange(start, end).repeat(2, 1)
        logits, past = forward(piece, torch.ones(2, end, dtype=torch.long), positions, past)
        pieces.append(logits)
        start = end
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=2e-5)
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, _ = forward(ids, mask, positions, nothing(2))
    alone = model(ids[:1, 5:]).logits
    torch.testing.assert_close(logits[:1, 5:], alone, rtol=0, atol=2e-5)


def assert_same_logits(forward, run_dir: Path, tolerance: float = 1e-5) -> None:
    ids = torch.randint(1, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(run_dir)(ids).logits
    assert expected.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(forward(ids), expected, rtol=0, atol=tolerance)


def test_a_checkpoint_is_used_and_published_as_the_final_model_is(run_dir, use_hub, publish):
    checkpoint = run_dir / "checkpoint-000060"
    assert piped(checkpoint) not in (PROMPT, piped(run_dir))
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        assert publish("--model_name_or_path", checkpoint, "--push_to_hub", "--hub_model_id", "us/half")[0] == 0
        assert set(hub.files("us/half", "model")) == WHOLE


def test_the_code_that_is_published_is_what_the_model_imports_whatever_version_wrote_it(
    run_dir, tmp_path, use_hub, publish
):
    folder = tmp_path / "older"
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoint-*", "best-checkpoint"))
    (folder / "document_mask.py").rename(folder / "packing.py")
    model_code = folder / "modeling_gpt2scratch.py"
    model_code.write_text(model_code.read_text().replace("from .document_mask import", "from .packing import"))
    (folder / "secrets.py").write_text("# somebody's own\n")
    command = ("--model_name_or_path", folder, "--push_to_hub", "--hub_model_id", "us/older")
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        assert publish(*command)[0] == 0
        sent = {name for name in hub.files("us/older", "model") if name.endswith(".py")}
        assert sent == CODE - {"document_mask.py"} | {"packing.py"}
        (folder / "packing.py").unlink()
        status, _, errors = publish(*command)
    assert status == 2 and errors.count("\n") == 1
    assert f"{folder} has not all of the model's code: " in errors and "packing.py" in errors
    model_code.unlink()  # which the config names
    _, _, errors = publish(*command, "--license", "A licence")
    assert f"{folder} has not all of the model's code: " in errors and "modeling_gpt2scratch.py" in errors
    assert "--license A licence is not a name" in errors and errors.count("\n") == 2  # all problems at once


def test_a_card_without_records_and_one_that_people_wrote_in(run_dir, tmp_path, use_hub, publish):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_dir), AutoTokenizer.from_pretrained(run_dir)
    for name in ("bare", "edited"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = (run_dir / "README.md").read_text()
    text = text.replace("## Limits", "## Thanks\n\nTo all.\n\n## Limits").replace("---\n", "---\nlanguage: en\n", 1)
    (tmp_path / "edited/README.md").write_text(text)
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        for name in ("bare", "edited"):
            command = ("--model_name_or_path", tmp_path / name, "--push_to_hub", "--hub_model_id", f"us/{name}")
            assert publish(*command)[0] == 0
        # Another heading, and the path in words of one's own: the example is found, the words are not ours to change.
        (tmp_path / "edited/README.md").write_text(text.replace("## Use it", "## Usage"))
        assert publish(*command)[0] == 0
        assert f"us/{name}" in hub.files("us/edited", "model")["README.md"].decode()
        (tmp_path / "edited/README.md").write_text(f"{text}\nSee {tmp_path / 'edited'}.\n")
        status, _, errors = publish(*command)
        assert status == 2 and f"README.md tells a path of this machine, {tmp_path / 'edited'}: take it out" in errors
        for content, problem in ((b"\xff", "cannot be read"), (b"---\ntags: [a\n---\n", "metadata that is not valid")):
            (tmp_path / "edited/README.md").write_bytes(content)
            status, _, errors = publish(*command)
            assert status == 2 and problem in errors and errors.count("\n") == 1
        bare = hub.files("us/bare", "model")["README.md"].decode()
        edited = ModelCard(hub.files("us/edited", "model")["README.md"].decode())
    assert "# bare" in bare and "library_name: transformers" in bare
    assert "## Thanks\n\nTo all." in edited.text and edited.data.language == "en"
    assert 'model="us/edited"' in edited.text and edited.data.eval_results


def test_a_converted_model_is_published_too(converted, run_dir, tmp_path, use_hub, publish):
    """Where that failed after it was written, by its own folder."""
    folder = tmp_path / "stock"
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        hub.fail(times=1, status=500, matching="/commit/")
        command = ("--model_name_or_path", run_dir, "--format", "gpt2", "--output_dir", folder, "--push_to_hub")
        status, output, errors = publish(*command, "--hub_model_id", "us/stock")
        assert status == 2 and output == f"written as {folder}\n" and "--push_to_hub us/stock failed: " in errors
        status, _, errors = publish(*command, "--hub_model_id", "us/stock")
        assert (
            status == 2 and "exists: choose another or delete it (or publish what is there, as --model_name" in errors
        )
        wanted = {
            folder: WHOLE - CODE,
            converted(publish, "gguf"): {"model.gguf", "README.md"},
            converted(publish, "onnx"): WHOLE - CODE - {"model.safetensors"} | {"onnx/model.onnx"},
        }
        for path, names in wanted.items():
            command = ("--model_name_or_path", path, "--push_to_hub", "--hub_model_id", f"us/{path.name}")
            assert publish(*command)[0] == 0
            files = hub.files(f"us/{path.name}", "model")
            assert set(files) == names | {"plots/loss.png", "plots/hellaswag.png"}
            assert_nothing_private(files, REPOSITORY, run_dir, path)
            assert f'"us/{path.name}"' in files["README.md"].decode()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["--model_name_or_path is required: a run folder", "nothing to do: give --push_to_hub, or a --format"]),
        (("--model_name_or_path", "RUN", "--format", "gguf"), ["--format gguf needs an --output_dir"]),
        (
            ("--model_name_or_path", "RUN", "--format", "gpt2", "--output_dir", "RUN", "--outtype", "f16"),
            ["--output_dir RUN exists: choose another or delete it", "--outtype f16 is for --format gguf"],
        ),
        (
            ("--model_name_or_path", "BARE", "--push_to_hub", "--license", "My own"),
            [
                "bare has no tokenizer.json: copy the files of its tokenizer into it",
                "--license My own is not a name as the Hub has them",
            ],
        ),
        (("--model_name_or_path", "EMPTY", "--push_to_hub"), ["EMPTY holds no finished model"]),
        (("--model_name_or_path", "gpt2", "--push_to_hub"), ["--model_name_or_path gpt2 is not a folder"]),
        (("--model_name_or_path", "RUN", "--push_to_hub", "--hub_model_id", ""), ["--hub_model_id is empty"]),
        (
            ("--model_name_or_path", "RUN", "--hub_model_id", "a/b"),
            ["nothing to do", "--hub_model_id a/b is for --push_to_hub: give both"],
        ),
    ],
)
def test_bad_command_lines_are_told_at_once(arguments, messages, run_dir, tmp_path, refuse):
    places = {"RUN": str(run_dir), "EMPTY": str(tmp_path), "BARE": str(tmp_path / "bare")}
    (tmp_path / "bare").mkdir()
    for name in {"config.json", "model.safetensors", *CODE}:
        shutil.copyfile(run_dir / name, tmp_path / "bare" / name)

    def put(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    lines = refuse(publish_model, *map(put, arguments))
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert put(message) in line


def test_a_conversion_that_fails_leaves_nothing(run_dir, tmp_path, publish):
    """A tokenizer that GGUF has no name for; weights that are damaged."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_dir), AutoTokenizer.from_pretrained(run_dir)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    description = json.loads((tmp_path / "model/tokenizer.json").read_text())
    description["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(description))
    command = ("--model_name_or_path", tmp_path / "model", "--format", "gguf", "--output_dir", tmp_path / "out")
    status, _, errors = publish(*command)
    assert status == 2 and "byte-level BPE tokenizers that split words as GPT-2's does" in errors
    (tmp_path / "model/model.safetensors").write_bytes(b"damaged")
    status, _, errors = publish(*command)
    assert status == 2 and f"{tmp_path / 'model'} cannot be loaded" in errors and "Traceback" not in errors
    status, _, errors = publish("--model_name_or_path", tmp_path / "model", "--push_to_hub")
    assert status == 2 and f"{tmp_path / 'model/model.safetensors'} is damaged, and is not published" in errors
    command = ("--model_name_or_path", run_dir, "--format", "gpt2", "--output_dir", tmp_path / "out")
    full = processes.start("publish_model.py", *command, fault=no_room_for_weights).wait()
    assert full.returncode == 2 and full.stderr.count("\n") == 1
    assert f"error: --output_dir {tmp_path / 'out'} cannot be written: " in full.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "home"}


def no_room_for_weights() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


STOCK_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", *TOKENIZER}


def test_the_branch_gpt2_has_the_model_without_remote_code(run_dir, tmp_path, use_hub, publish):
    command = ("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        assert publish(*command)[0] == 0
        files, main = (hub.files("us/model", "model", revision) for revision in ("gpt2", "main"))
        plots = {name for name in main if name.startswith("plots/")}
        assert set(files) == STOCK_FILES | plots and plots and not any(name.endswith(".py") for name in files)
        assert "auto_map" not in json.loads(files["config.json"])
        cards = [main["README.md"].decode(), files["README.md"].decode()]
        assert code_blocks(cards[0])[1] == code_blocks(cards[1])[0]
        assert 'model="us/model", revision="gpt2")' in code_blocks(cards[1])[0]
        assert "trust_remote_code" not in cards[1] and 'model="us/model", trust_remote_code=True' in cards[0]
        assert_nothing_private({**files, "main": main["README.md"]}, run_dir)
        program = f"""
import importlib.util, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("modeling_gpt2scratch") is None
model = AutoModelForCausalLM.from_pretrained("us/model", revision="gpt2")
assert type(model).__name__ == "GPT2LMHeadModel"
ids = torch.randint(1, 320, (2, 32), generator=torch.Generator().manual_seed(0))
torch.save(model(ids).logits, "logits.pt")
exec(compile({code_blocks(cards[0])[1]!r}, "card", "exec"))
"""
        elsewhere = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", **hub.environment(tmp_path / "you")}
        succeed(run(sys.executable, "-c", program, cwd=tmp_path, **elsewhere))
        assert_same_logits(lambda ids: torch.load(tmp_path / "logits.pt"), run_dir)

        # Again, and for other weights: the branch follows.
        before = len(hub.repositories["model", "us/model"].branches["gpt2"])
        assert publish(*command)[0] == 0
        assert len(hub.repositories["model", "us/model"].branches["gpt2"]) == before
        other = run_dir / "checkpoint-000060"
        assert publish("--model_name_or_path", other, *command[2:])[0] == 0
        assert hub.files("us/model", "model", "gpt2")["model.safetensors"] != files["model.safetensors"]


def test_a_push_that_broke_off_between_branch_and_main_is_noticed_and_completed(run_dir, use_hub, publish):
    command = ("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
    notice = "us/model: the branch gpt2 was written, but main was not; this push completes it\n"
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        hub.fail(times=1, status=500, matching="/commit/main")
        status, output, errors = publish(*command)
        assert (status, output) == (2, "") and errors.count("\n") == 1
        assert (
            titles(hub, "us/model") == ["initial commit"] and "gpt2" in hub.repositories["model", "us/model"].branches
        )
        status, output, errors = publish(*command)
        assert (status, errors) == (0, "") and output.startswith(notice)
        assert set(hub.files("us/model", "model")) >= WHOLE
        status, output, _ = publish(*command)
        assert status == 0 and notice not in output


def test_without_the_branch_nothing_is_converted(run_dir, use_hub, publish, monkeypatch):
    monkeypatch.delattr("pretraining.publishing.push.stock_form")
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        command = ("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
        assert publish(*command, "--stock_branch", "false")[0] == 0
        assert set(hub.repositories["model", "us/model"].branches) == {"main"}
        assert 'revision="gpt2"' not in hub.files("us/model", "model")["README.md"].decode()


def test_what_somebody_else_put_on_the_branch_stays(run_dir, use_hub, publish):
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        hub.add("us/model", {"theirs.txt": b"of main"}, "model")
        huggingface_hub.HfApi().create_branch("us/model", branch="gpt2")
        huggingface_hub.HfApi().upload_file(
            path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id="us/model", revision="gpt2"
        )
        assert publish("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")[0] == 0
        files = hub.files("us/model", "model", "gpt2")
    assert files["mine.txt"] == b"mine" and "theirs.txt" not in files and set(files) >= STOCK_FILES


def test_a_stock_form_that_cannot_be_written_is_an_error_in_one_line(run_dir, use_hub, publish, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretraining.publishing.stock_branch.write_stock", full)
    with Hub(token=TOKEN) as hub:
        use_hub(hub)
        status, _, errors = publish("--model_name_or_path", run_dir, "--push_to_hub", "--hub_model_id", "us/model")
    assert status == 2 and errors.count("\n") == 1
    assert "No space left on device (--stock_branch false leaves it out)" in errors
