"""HellaSwag: the same numbers as the two published protocols, whatever the batch size and the number of processes."""

import contextlib
import io
import json
import re
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import script, succeed
from huggingface_hub import EvalResult, ModelCard, ModelCardData, parse_eval_result_entries
from support.generated_items import TEXT, generated_records, write_items
from support.hub_server import Hub
from support.processes import run_ranks
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import eval_hellaswag
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining.errors import UserError
from pretraining.evaluation.hellaswag_items import encode_items, load_items
from pretraining.evaluation.hellaswag_scoring import can_be_trees, score_items
from pretraining.tokenization.tokenizer import train_tokenizer
from pretraining.training.model import load_model_and_tokenizer

WINDOW = 96
PROTOCOLS = ("completion", "lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model("gpt2scratch", len(tokenizer), n_positions=WINDOW)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return load_items(write_items(tmp_path_factory.mktemp("items") / "items.jsonl", generated_records(19)))


def random_model(model_type: str, vocab_size: int, **kwargs):
    """Two narrow layers, with weights large enough for the endings to differ by much more than rounding."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **shape, **tokens, **kwargs)
    return AutoModelForCausalLM.from_config(config).eval()


def transcribed_score(model, tokenizer, item: dict, protocol: str) -> dict:
    """The published formulas, one ending at a time, from all logits."""
    sums, norms = [], []
    for ending in item["endings"]:
        if protocol == "completion":
            context = tokenizer.encode(item["ctx"], add_special_tokens=False)
            continuation = tokenizer.encode(" " + ending, add_special_tokens=False)
        else:
            context_text = item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize()
            context_text, ending = without_marks(context_text), without_marks(ending)
            continuation_text = " " + ending
            while context_text.endswith(" "):
                context_text, continuation_text = context_text[:-1], " " + continuation_text
            context = tokenizer.encode(context_text, add_special_tokens=False)
            whole = tokenizer.encode(context_text + continuation_text, add_special_tokens=False)
            continuation = whole[len(context) :]
        assert len(continuation) < WINDOW
        tokens = torch.tensor([(context + continuation)[-(WINDOW + 1) :]])
        with torch.no_grad():
            log_probabilities = model(tokens[:, :-1]).logits[0].double().log_softmax(dim=-1)
        scored = range(tokens.shape[1] - len(continuation), tokens.shape[1])
        sums.append(sum(log_probabilities[at - 1, tokens[0, at]].item() for at in scored))
        norms.append(sums[-1] / (len(continuation) if protocol == "completion" else len(ending)))
    best = [max(range(4), key=values.__getitem__) for values in (sums, norms)]
    return {"ind": item["ind"], "label": item["label"], "loglikelihoods": sums, "pred": best[0], "pred_norm": best[1]}


def without_marks(text: str) -> str:
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


def assert_same_scores(found: list[dict], expected: list[dict], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=tolerance)
        assert {**one, "loglikelihoods": None} == {**other, "loglikelihoods": None}


def scores_of(model, tokenizer, items: list[dict], protocol: str, batch_size: int) -> list[dict]:
    encoded = encode_items(model.config, tokenizer, items, protocol)
    assert can_be_trees(model, encoded) != any(torch.isnan(weights).any() for weights in model.parameters())
    return score_items(model, encoded, batch_size, as_trees=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_are_those_of_the_published_formulas(model, tokenizer, items, protocol):
    expected = [transcribed_score(model, tokenizer, item, protocol) for item in items]
    assert_same_scores(scores_of(model, tokenizer, items, protocol, batch_size=4), expected)
    assert any(score["pred"] != score["pred_norm"] for score in expected), "on these items the two rules should differ"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_batch_size_changes_no_score(model, tokenizer, items, protocol):
    one_by_one = scores_of(model, tokenizer, items, protocol, batch_size=1)
    for batch_size in (2, 5, 100):
        assert_same_scores(scores_of(model, tokenizer, items, protocol, batch_size), one_by_one)


def test_a_text_too_long_for_the_model_loses_its_beginning(model, tokenizer, items):
    def scores(ctx: str) -> list[float]:
        return scores_of(model, tokenizer, [{**items[1], "ctx": ctx}], "completion", 1)[0]["loglikelihoods"]

    long = "In the beginning " + items[1]["ctx"] * 10
    assert len(tokenizer.encode(long)) > 2 * WINDOW
    assert scores(long) == scores("another one " + long)
    assert scores(long) != scores(long + " and")
    lengths = [len(tokenizer.encode(f"{item['ctx']} {ending}")) for item in items for ending in item["endings"]]
    assert min(lengths) < WINDOW < max(lengths), "the other tests should see items of both kinds"


def test_an_ending_longer_than_the_model_is_scored_as_far_as_it_fits(model, tokenizer, items):
    endings = [TEXT[:600], *items[0]["endings"][1:]]
    score = scores_of(model, tokenizer, [{**items[0], "endings": endings}], "completion", 1)[0]
    tokens = torch.tensor([tokenizer.encode(" " + TEXT[:600])[-(WINDOW + 1) :]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0]
    expected = -torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    assert score["loglikelihoods"][0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_any_causal_language_model_can_be_scored(model_type, tokenizer, items):
    kwargs = {"gpt2": {"n_positions": WINDOW}, "gemma2": {"head_dim": 16, "num_key_value_heads": 2}}[model_type]
    if model_type == "gemma2":  # caps its logits after the head
        kwargs |= {"final_logit_softcapping": 1.0, "intermediate_size": 64, "max_position_embeddings": WINDOW}
    model = random_model(model_type, len(tokenizer), **kwargs)
    expected = [transcribed_score(model, tokenizer, item, "lm_eval") for item in items[:6]]
    assert_same_scores(scores_of(model, tokenizer, items[:6], "lm_eval", batch_size=3), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_tokenizer_s_begin_of_text_token_comes_before_the_context_as_in_the_harness(items, protocol):
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    first = tokenizer.convert_ids_to_tokens(7)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 7)])
    plain = encode_items(GPT2ScratchConfig(), train_tokenizer([TEXT], vocab_size=400), items, protocol)
    for item, without in zip(encode_items(GPT2ScratchConfig(), tokenizer, items, protocol), plain, strict=True):
        pairs = zip(item.endings, without.endings, strict=True)
        assert all(one.token_ids == [7, *other.token_ids] for one, other in pairs)
        assert [one.num_scored for one in item.endings] == [other.num_scored for other in without.endings]


def test_the_model_comes_back_as_it_was(model, tokenizer, items):
    model.train()
    scores_of(model, tokenizer, items[:2], "completion", batch_size=2)
    still_training = model.training
    model.eval()
    assert still_training
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, len(tokenizer))


def test_a_model_that_gives_nan_has_no_accuracy(model, tokenizer, items):
    broken = GPT2ScratchForCausalLM(model.config)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match=r"item \d+: the model's log-likelihoods are \[nan, "):
        scores_of(broken, tokenizer, items, "completion", batch_size=4)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, items):
    small = GPT2ScratchForCausalLM(GPT2ScratchConfig(vocab_size=100, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match=r"the tokenizer gave token \d+, the model has only 100"):
        scores_of(small, tokenizer, items, "completion", batch_size=4)


def test_every_malformed_item_gives_one_line(tmp_path):
    good = generated_records(1)[0]
    wrong = {
        "not valid JSON, Expecting property name enclosed in double quotes at character 2": "{nonsense",
        "an item must be a JSON object, got [1, 2]": "[1, 2]",
        "no ctx_b, label": {key: value for key, value in good.items() if key not in ("ctx_b", "label")},
        "ctx_a must be a text, got None": {**good, "ctx_a": None},
        "ctx must be a text that is not empty, got '  '": {**good, "ctx": "  "},
        "endings must be a list of 4 texts, got ['a', 'b', 'c']": {**good, "endings": ["a", "b", "c"]},
        "ending 2 must be a text that is not empty, got ''": {**good, "endings": ["a", "b", "", "d"]},
        "ending 0 must be a text that is not empty, got 7": {**good, "endings": [7, "b", "c", "d"]},
        "label must be 0, 1, 2 or 3, got 4": {**good, "label": 4},
        "label must be 0, 1, 2 or 3, got ''": {**good, "label": ""},  # the Hub's test split
    }
    lines = [line if isinstance(line, str) else json.dumps(line) for line in wrong.values()]
    path = tmp_path / "items.jsonl"
    path.write_text("\n\n".join([json.dumps(good), *lines]) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_items(path)
    expected = [f"{path} line {number}: {message}" for number, message in zip(range(3, 99, 2), wrong, strict=False)]
    assert list(error.value.problems) == expected
    assert [item["ind"] for item in load_items(path, limit=1)] == [good["ind"]]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("[" * 100_000, "not valid JSON, nested too deeply"),
        (json.dumps({**generated_records(1)[0], "ctx_b": "\ud83d"}), "ctx_b must be Unicode without lone surrogates"),
    ],
)
def test_a_line_that_breaks_parsers_or_tokenizers_gives_one_line_too(tmp_path, line, problem):
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=f"line 1: {problem}"):
        load_items(path)


def test_a_label_may_be_in_quotes_as_in_the_copy_on_the_hub(tmp_path):
    records = [{**record, "label": label} for record, label in zip(generated_records(2), (3, "3"), strict=True)]
    assert [item["label"] for item in load_items(write_items(tmp_path / "items.jsonl", records))] == [3, 3]


def test_a_file_of_another_kind_gives_no_more_than_a_screen(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"text": "something else"}\n' * 500)
    with pytest.raises(UserError) as error:
        load_items(path)
    assert len(error.value.problems) == 11
    assert error.value.problems[-1] == f"{path}: 490 more items are malformed"


@pytest.mark.parametrize("content, message", [(None, "No such file"), (b"\n", "no items"), (b"\xff", "utf-8")])
def test_a_file_without_items_is_refused(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_items(path)


def test_what_is_not_a_model_is_refused_in_one_line(tmp_path, model, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert "config.json" in refusal(tmp_path)

    model.save_pretrained(tmp_path)
    loaded, _ = load_model_and_tokenizer(AutoModelForCausalLM, str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    assert "lacks 16 weights that its config.json asks for, such as model.layers.2" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 3}))
    assert "n_embd (32) must be a multiple of n_head (3)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    assert "cannot be loaded" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "missing")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model_and_tokenizer(AutoModelForCausalLM, str(path))
    (problem,) = error.value.problems
    assert str(path) in problem and "\n" not in problem
    return problem


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_and_three_processes_write_the_same_files(tmp_path, model_folder, items):
    data_file = write_items(tmp_path / "items.jsonl", generated_records(19))
    written = {}
    for processes, name in ((1, "one"), (3, "three")):
        output_file, predictions_file = tmp_path / name / "results.json", tmp_path / name / "items.jsonl"
        source = ("--model_name_or_path", model_folder, "--data_file", data_file, "--limit", 17)
        how = ("--protocol", "lm_eval", "--per_device_eval_batch_size", 3)
        output = ("--output_file", output_file, "--predictions_file", predictions_file)
        arguments = ("eval_hellaswag.py", *source, *how, *output)
        runs = [succeed(run) for run in run_ranks(processes, *arguments)]
        printed = [run.stdout.count("acc_norm_stderr") for run in runs]
        assert printed == [1, 0, 0][:processes], "only one process prints"
        assert sorted(path.name for path in output_file.parent.iterdir()) == ["items.jsonl", "results.json"]
        lines = predictions_file.read_text().splitlines()
        written[name] = json.loads(output_file.read_text()), [json.loads(line) for line in lines]

    result, scores = written["one"]
    assert list(result) == ["protocol", "n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "model"]
    assert (result["protocol"], result["n"], result["model"]) == ("lm_eval", 17, str(model_folder))
    for name, choice in (("acc", "pred"), ("acc_norm", "pred_norm")):
        assert result[name] == pytest.approx(sum(score[choice] == score["label"] for score in scores) / 17)
    assert [list(score) for score in scores] == [["ind", "label", "loglikelihoods", "pred", "pred_norm"]] * 17
    assert [score["ind"] for score in scores] == [item["ind"] for item in items[:17]]
    assert written["three"][0] == result
    assert_same_scores(written["three"][1], scores)


def test_cut_items_are_named(tmp_path, model_folder, items, tokenizer, model):
    data_file = write_items(tmp_path / "items.jsonl", generated_records(19))
    run = succeed(script("eval_hellaswag.py", "--model_name_or_path", model_folder, "--data_file", data_file))
    longest = {
        item["ind"]: max(len(tokenizer.encode(f"{item['ctx']} {end}")) for end in item["endings"]) for item in items
    }
    cut = [str(ind) for ind, length in longest.items() if length > WINDOW + 1]
    assert 1 < len(cut) <= 10
    message = "{} of 19 items are longer than the model's 96 positions and lose the beginning of their context: {}\n"
    assert message.format(len(cut), ", ".join(cut)) in run.stderr


def test_a_model_that_sees_no_trees_is_scored_all_the_same_and_that_is_told(tmp_path, tokenizer, items):
    model = random_model("bloom", len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    short = [number for number in range(len(items)) if number % 3]  # this model has no last position to cut them at
    data_file = write_items(tmp_path / "items.jsonl", [generated_records(19)[number] for number in short])
    arguments = ("--model_name_or_path", tmp_path / "model", "--data_file", data_file)
    run = succeed(script("eval_hellaswag.py", *arguments, "--predictions_file", tmp_path / "scores.jsonl"))
    assert "this model does not see trees of tokens as it should: each ending is scored by itself" in run.stderr
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert_same_scores(found, [transcribed_score(model, tokenizer, items[number], "completion") for number in short])


def test_what_cannot_be_written_does_not_keep_the_rest_from_being_written(tmp_path, model_folder):
    data_file = write_items(tmp_path / "items.jsonl", generated_records(2))
    arguments = ("--model_name_or_path", model_folder, "--data_file", data_file, "--output_file", tmp_path / "r.json")
    # Too long a name only with what is behind it until the file is whole.
    run = script("eval_hellaswag.py", *arguments, "--predictions_file", tmp_path / ("x" * 250))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].endswith(f"{'x' * 250} cannot be written: File name too long")
    assert json.loads(run.stdout) == json.loads((tmp_path / "r.json").read_text())


class RemoteConfig(GPT2Config):
    model_type = "not-gpt2"


class RemoteModel(GPT2LMHeadModel):
    config_class = RemoteConfig


def test_code_that_comes_with_a_model_runs_only_if_asked_for(tmp_path, tokenizer):
    RemoteConfig.register_for_auto_class()
    RemoteModel.register_for_auto_class("AutoModelForCausalLM")
    RemoteModel(RemoteConfig(vocab_size=400, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith(
        "comes with code of its own: read it, and if it may run here, give --trust_remote_code"
    )
    model, _ = load_model_and_tokenizer(AutoModelForCausalLM, str(tmp_path), trust_remote_code=True)
    assert type(model).__name__ == "RemoteModel" and type(model) is not RemoteModel


def test_a_card_gets_the_result_and_keeps_what_it_has(tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    other = EvalResult("text-generation", "other/data", "Other", "acc", 0.5, metric_name="accuracy")
    card_data = ModelCardData(license="mit", model_name="kept", eval_results=[other])
    (folder / "README.md").write_text(f"---\n{card_data}\n---\n# A model\n")
    data_file = write_items(tmp_path / "items.jsonl", generated_records(5))
    arguments = ("--model_name_or_path", folder, "--data_file", data_file, "--update_model_card")
    for protocol in ("lm_eval", "completion", "lm_eval"):
        run = succeed(script("eval_hellaswag.py", *arguments, "--protocol", protocol))
    result = json.loads(run.stdout)
    card = ModelCard.load(folder / "README.md")
    assert card.text.strip() == "# A model" and (card.data.license, card.data.model_name) == ("mit", "kept")
    first, *added = card.data.eval_results
    assert first == other
    assert [(entry.metric_type, entry.metric_args["protocol"]) for entry in added] == [
        *(("acc", "completion"), ("acc_norm", "completion"), ("acc", "lm_eval"), ("acc_norm", "lm_eval"))
    ]
    last = added[-1]
    assert last.dataset_type == last.dataset_name == "items.jsonl" and last.dataset_split is None
    assert last.metric_value == pytest.approx(result["acc_norm"], abs=1e-4)
    assert last.metric_args == {"protocol": "lm_eval", "n": 5, "stderr": round(result["acc_norm_stderr"], 4)}


def test_a_card_that_cannot_be_read_costs_nothing_but_its_update(tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    data_file = write_items(tmp_path / "items.jsonl", generated_records(2))
    arguments = ("--model_name_or_path", folder, "--data_file", data_file, "--output_file", tmp_path / "result.json")
    run = script("eval_hellaswag.py", *arguments, "--update_model_card")
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"error: --update_model_card: the card of {folder}: " in run.stderr
    assert json.loads(run.stdout) == json.loads((tmp_path / "result.json").read_text())
    assert (folder / "README.md").read_text() == "---\nlicense: [mit\n---\n"


def test_from_a_hub_and_back(tmp_path, model_folder):
    """The model, the dataset and the metric come from a Hub, the result goes into the model's card there."""
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    records = [{**record, "label": str(record["label"])} for record in generated_records(6)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    test_split = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**record, "label": ""} for record in records]), test_split)
    with Hub(token="secret") as hub:
        first = hub.add("us/model", {**files, "README.md": b"---\nlicense: mit\n---\n# Ours\n"}, "model")
        hub.add("us/model", {"config.json": b"broken"}, "model")
        splits = {"validation": buffer.getvalue(), "test": test_split.getvalue()}
        commit = hub.add(
            "Rowan/hellaswag", {f"data/{name}-00000.parquet": content for name, content in splits.items()}
        )
        environment = hub.environment(tmp_path / "me")
        output = ("--predictions_file", tmp_path / "items.jsonl", "--model_name_or_path", "us/model")
        succeed(script("eval_hellaswag.py", *output, "--model_revision", first, **environment))
        lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
        assert [(line["ind"], line["label"]) for line in lines] == [
            (each["ind"], int(each["label"])) for each in records
        ]

        hub.add("us/model", files, "model")
        result = json.loads(succeed(script("eval_hellaswag.py", *output, "--update_model_card", **environment)).stdout)
        card = ModelCard(hub.files("us/model", "model")["README.md"].decode())
        assert card.data.license == "mit" and card.data.model_name == "model"
        assert {(each.dataset_type, each.dataset_name, each.dataset_split) for each in card.data.eval_results} == {
            ("Rowan/hellaswag", "HellaSwag", "validation")
        }
        assert [entry.metric_value for entry in card.data.eval_results] == [
            pytest.approx(result[name], abs=1e-4) for name in ("acc", "acc_norm")
        ]
        results = hub.files("us/model", "model")[".eval_results/hellaswag-completion-protocol.yaml"]
        for entry, name in zip(parse_eval_result_entries(yaml.safe_load(results)), ("acc", "acc_norm"), strict=True):
            assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (
                "Rowan/hellaswag",
                "hellaswag",
                commit,
            )
            assert entry.value == pytest.approx(result[name], abs=1e-4)
            assert entry.notes == (
                f"{name}, completion protocol, 6 items, standard error {result[f'{name}_stderr']:.4f}"
            )


def no_sleep() -> None:
    """huggingface_hub and datasets wait between their tries to reach the Hub, 25 seconds in all."""
    time.sleep = lambda seconds: None


@pytest.mark.parametrize("is_there", [True, False])
def test_items_in_the_cache_need_no_hub(tmp_path, model_folder, is_there):
    """Neither one that can be reached, nor one that still has them."""
    records = [{**record, "label": str(record["label"])} for record in generated_records(3)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    command = ("eval_hellaswag.py", "--model_name_or_path", model_folder, "--output_file", tmp_path / "result.json")
    with Hub() as hub:
        hub.add("Rowan/hellaswag", {"data/validation-00000.parquet": buffer.getvalue()})
        environment = hub.environment(tmp_path / "me")
        succeed(script(*command, **environment))
    before = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").unlink()
    with Hub() if is_there else contextlib.nullcontext():
        succeed(script(*command, fault=no_sleep, **environment))
    assert (tmp_path / "result.json").read_text() == before


def test_mistakes_at_the_command_line_are_told_all_at_once(tmp_path, refuse):
    (tmp_path / "file").touch()
    words = ("--data_file", "x", "--dataset_name", "y", "--limit", 0, "--protocol", "other", "--output_file", tmp_path)
    words += ("--predictions_file", tmp_path / "file" / "items.jsonl")
    lines = refuse(eval_hellaswag, *words)
    assert [line.split(": ")[2].split()[0] for line in lines] == [
        "--protocol",
        "--model_name_or_path",
        "--limit",
        "--data_file",
        "--output_file",
        "--predictions_file",
    ]
    assert lines[-1].endswith(f"items.jsonl cannot be written: {tmp_path / 'file'} is not a folder")


def test_a_card_that_is_not_there_is_told_before_the_work(tmp_path, refuse):
    (line,) = refuse(eval_hellaswag, "--model_name_or_path", tmp_path, "--update_model_card")
    assert line.endswith(f"--update_model_card: {tmp_path} has no README.md")
    (line,) = refuse(eval_hellaswag, "--model_name_or_path", "a/b", "--update_model_card", "--limit", 5)
    assert line.endswith("--update_model_card is for a result of all items, not for a --limit")
    same = ("--output_file", tmp_path / "x", "--predictions_file", tmp_path / "x")
    (line,) = refuse(eval_hellaswag, "--model_name_or_path", "a/b", *same)
    assert line.endswith(f"--output_file and --predictions_file are the same file, {tmp_path / 'x'}")
    (line,) = refuse(eval_hellaswag, "--model_name_or_path", tmp_path, "--model_revision", "v1")
    assert line.endswith(f"--model_revision is for a model on the Hub, {tmp_path} is a folder")
    (line,) = refuse(eval_hellaswag, "--model_name_or_path", "a/b", "--model_revision", "v1", "--update_model_card")
    assert line.endswith("is for the newest revision of a model, not for a --model_revision")
