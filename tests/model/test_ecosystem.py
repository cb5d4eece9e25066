"""The libraries that people train, measure and serve models with take this one as they take stock GPT-2."""

import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from conftest import make_documents, run, succeed
from datasets import Dataset
from peft import LoraConfig
from support.local_tasks import OWN_TASKS_ALONE
from support.processes import free_port, wait_until
from support.tiny_models import randomise, stock_model_with_the_weights_of, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_gpt2scratch import GPT2ScratchForCausalLM
from pretraining.tokenization.tokenizer import train_tokenizer

WINDOW = 64
SHAPE = {"vocab_size": 300, "n_positions": WINDOW, "n_embd": 32, "n_layer": 2, "n_head": 2}
TEXTS = [text[: 30 + 7 * (index % 9)] for index, text in enumerate(make_documents(24))]
JSON = {"Content-Type": "application/json"}
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps as small as these take several times as long when threads have to wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, as training leaves them, with weights at which every part matters."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(make_documents(24), vocab_size=SHAPE["vocab_size"])
    assert len(tokenizer) == SHAPE["vocab_size"]
    model = tiny_model(**SHAPE)
    randomise(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def ours(folder) -> GPT2ScratchForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def stock(folder):
    """The reference, for values before any training."""
    return stock_model_of(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def stock_model_of(model):
    return stock_model_with_the_weights_of(model, **SHAPE, use_cache=False)  # a cache would keep documents together


def packed_rows(tokenizer, number: int = 20, length: int = 32) -> Dataset:
    """Documents one after the other, each with positions of its own. Some rows have fewer labels than others."""
    ids, positions = [], []
    for text in TEXTS:
        document = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        ids += document
        positions += range(len(document))
    assert len(ids) >= number * length and max(positions) < WINDOW
    rows = [slice(start, start + length) for start in range(0, number * length, length)]
    labels = [[-100] * 20 + ids[row][20:] if index % 3 == 0 else ids[row] for index, row in enumerate(rows)]
    columns = {"input_ids": [ids[row] for row in rows], "position_ids": [positions[row] for row in rows]}
    return Dataset.from_dict({**columns, "labels": labels})


def make_trainer(model, rows: Dataset, output_dir: Path) -> Trainer:
    """Every step sees all of the rows, in two parts: what it logs before any training can be computed at once."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=len(rows) // 2,
        per_device_eval_batch_size=len(rows),
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        weight_decay=0.1,  # of the weights alone: which those are, Trainer reads from names and classes
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        **QUIET,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_trainer_trains_evaluates_and_resumes_as_with_the_stock_model(ours, folder, tokenizer, tmp_path):
    rows = packed_rows(tokenizer)
    stock = stock_model_of(ours)
    unpatched = make_trainer(stock_model_of(ours), rows, tmp_path / "unpatched")
    # GPT2LMHeadModel has none, by its name, so that Trainer counts the first label of a row, which nothing predicts.
    stock.loss_type = ours.loss_type
    columns = {name: torch.tensor(rows[name]) for name in ("input_ids", "position_ids", "labels")}
    labels = columns.pop("labels")
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(stock(**columns).logits[:, :-1].mT, labels[:, 1:]).item()

    trainer, reference = make_trainer(ours, rows, tmp_path / "ours"), make_trainer(stock, rows, tmp_path / "stock")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.state.log_history.clear()
    for one in (trainer, reference):
        one.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    unpatched.train()
    counted, predicted = (labels != -100).sum().item(), (labels[:, 1:] != -100).sum().item()
    assert logged(unpatched, "loss")[0] == pytest.approx(expected * predicted / counted, rel=1e-5)
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(trainer, name) == pytest.approx(logged(reference, name), rel=1e-4)

    # Without logits in training, but with them where metrics are computed from them.
    prediction = trainer.predict(rows)
    assert prediction.predictions.shape == (len(rows), 32, SHAPE["vocab_size"])
    trained = stock_model_of(AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-6"))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(prediction.predictions), trained(**columns).logits, rtol=0, atol=1e-4)

    resumed = make_trainer(AutoModelForCausalLM.from_pretrained(folder), rows, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    assert logged(resumed, "loss") == losses  # three of them from the checkpoint's own log
    assert resumed.evaluate()["eval_loss"] == pytest.approx(prediction.metrics["test_loss"], rel=1e-6)


def make_sft_trainer(model, tokenizer, output_dir: Path, **options) -> SFTTrainer:
    """Every step sees all of the texts, packed: what the first one logs can be computed document by document."""
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_length=WINDOW,
        packing=True,
        per_device_train_batch_size=len(TEXTS),
        max_steps=4,
        learning_rate=1e-2,
        save_strategy="no",
        bf16=False,
        **QUIET,
    )
    texts = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer, **options)


def assert_first_step_is_that_of_the_documents_alone(trainer: SFTTrainer, stock, tokenizer) -> None:
    """Loss, accuracy and entropy, of the stock model on one document at a time."""
    losses, entropies, hits = [], [], []
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = stock(ids).logits[0, :-1].log_softmax(-1)
        targets = ids[0, 1:]
        losses.append(-log_probs.gather(1, targets[:, None])[:, 0])
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        hits.append((log_probs.argmax(-1) == targets).float())
    for name, values in (("loss", losses), ("entropy", entropies), ("mean_token_accuracy", hits)):
        assert logged(trainer, name)[0] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)


def test_sft_trainer_keeps_packed_documents_apart(ours, stock, tokenizer, tmp_path):
    trainer = make_sft_trainer(ours, tokenizer, tmp_path)
    trainer.train()
    assert_first_step_is_that_of_the_documents_alone(trainer, stock, tokenizer)
    losses = logged(trainer, "loss")
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in ours.state_dict().items())


def test_sft_trainer_with_lora_trains_the_adapter_alone(ours, stock, folder, tokenizer, tmp_path):
    base = {name: weight.clone() for name, weight in ours.state_dict().items()}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")  # all but the head, as PEFT finds it
    trainer = make_sft_trainer(ours, tokenizer, tmp_path, peft_config=lora)
    trainer.train()
    assert_first_step_is_that_of_the_documents_alone(trainer, stock, tokenizer)
    losses = logged(trainer, "loss")
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]

    weights = trainer.model.get_base_model().state_dict()
    adapters = {name: weight for name, weight in weights.items() if ".lora_" in name}
    assert len(adapters) == 2 * 6 * SHAPE["n_layer"]  # A and B of q, k, v, o, up and down
    assert all(weight.abs().max() > 0 for weight in adapters.values())  # every B began as zeros
    kept = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if name not in adapters}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)

    trainer.save_model()
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    fresh.load_adapter(str(tmp_path))
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(fresh(ids).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(expected, stock(ids).logits, atol=1e-2)


def greedy_text(model, tokenizer, prompt: str, max_new_tokens: int = 8) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def bits_per_byte(model, tokenizer, texts: list[str]) -> float:
    """Each token from those before it, of which a text has an end-of-text token as the first, and at most a window."""
    bits = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text).input_ids])
        for start in range(1, len(ids), WINDOW):  # the harness's windows, the last of which has all the context it can
            end = min(start + WINDOW, len(ids))
            seen = ids[max(0, end - 1 - WINDOW) : end - 1]
            with torch.no_grad():
                log_probs = model(seen[None]).logits[0, start - end :].log_softmax(-1)
            bits -= log_probs.gather(1, ids[start:end, None]).sum().item() / torch.log(torch.tensor(2.0)).item()
    return bits / sum(len(text.encode()) for text in texts)


def test_lm_eval_s_command_line_takes_the_folder_with_its_code(folder, stock, tokenizer, tmp_path):
    texts = [*TEXTS[:5], make_documents(1, seed=1)[0]]
    assert len(tokenizer(texts[-1]).input_ids) > WINDOW
    prompts = [text[:20] for text in TEXTS[:5]]
    continuations = [greedy_text(stock, tokenizer, prompt) for prompt in prompts]
    continuations[-1] += "!"  # one that the model does not write

    def write_task(name: str, rows: list[dict], **settings) -> Path:
        data_file = tmp_path / f"{name}.jsonl"
        data_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs = {"data_files": {"test": str(data_file)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **settings}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(task))
        return path

    rolling = write_task(
        "rolling",
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    greedy = write_task(
        "greedy",
        [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, continuations, strict=True)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{text}}",
        generation_kwargs={"do_sample": False, "max_gen_toks": 8, "until": [tokenizer.eos_token]},
        metric_list=[{"metric": "exact_match"}],
    )
    program = f"{OWN_TASKS_ALONE}from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = (sys.executable, "-P", "-c", program, "run", "--model", "hf", "--device", "cpu", "--batch_size", 4)
    model = ("--model_args", f"pretrained={folder},trust_remote_code=True")
    output = ("--tasks", f"{rolling},{greedy}", "--output_path", tmp_path / "results")
    # Elsewhere than in the repository, so that the model's code can only be the folder's.
    succeed(run(*command, *model, *output, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")))
    assert list((tmp_path / "modules").rglob("modeling_gpt2scratch.py"))
    (results,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    expected = bits_per_byte(stock, tokenizer, texts)
    assert figures["rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert figures["greedy"]["exact_match,none"] == pytest.approx(4 / 5)


@contextmanager
def serve(folder: Path, log_file: Path):
    """`transformers serve` in a process of its own, as long as the block lasts. Gives its address."""
    port = free_port()
    command = (Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu")
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log_file.open("w") as log:
        process = Popen([*command, "--host", "127.0.0.1", "--port", str(port)], env=variables, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log_file.read_text()
        with suppress(OSError), urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
        return False

    try:
        wait_until(answers, timeout=120)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except TimeoutExpired:
            process.kill()
            process.wait()


def test_transformers_serve_writes_what_the_model_writes(ours, tokenizer, tmp_path):
    """
    It serves a model saved in stock form: `transformers serve` looks for the class in transformers itself, whatever
    `--trust-remote-code` says. Without a chat template, there are completions to ask for, but no chats.
    """
    ours.save_pretrained(tmp_path / "exported", save_original_format=True)
    tokenizer.save_pretrained(tmp_path / "exported")
    texts = []
    with serve(tmp_path / "exported", tmp_path / "log") as address:
        for prompt in TEXTS[:3]:
            body = {"model": str(tmp_path / "exported"), "prompt": prompt, "max_tokens": 12, "temperature": 0}
            request = Request(f"{address}/v1/completions", json.dumps(body).encode(), JSON)
            with urlopen(request, timeout=60) as response:
                texts.append(json.load(response)["choices"][0]["text"])
    assert texts == [greedy_text(ours, tokenizer, prompt, max_new_tokens=12) for prompt in TEXTS[:3]]
    assert len(set(texts)) == 3 and all(texts)
