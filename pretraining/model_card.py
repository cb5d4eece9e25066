"""The model card: what a run was, how good its model is and how to use it, from the run's own records."""

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig
from yaml import YAMLError

from pretraining.arguments import UserError, one_line
from pretraining.files import write_text
from pretraining.markdown import table

CARD = "README.md"
LICENSE = "mit"  # of the weights, unless --license says otherwise
USE = "## Use it"
STRING = r'"(?:[^"\\\n]|\\.)*"'  # between quotes, with escapes
USE_SECTION = re.compile(rf"^{USE}$.*?(?=^## |\Z)", flags=re.M | re.S)  # up to the next heading
HELLASWAG = "Rowan/hellaswag"
Format = Literal["gpt2scratch", "gpt2", "gguf", "onnx"]

PIPELINE = """```python
from transformers import pipeline

generator = pipeline("text-generation", model={name}{trust})
print(generator({prompt}, max_new_tokens={new_tokens})[0]["generated_text"])
```"""
GGUF = """With transformers (`pip install transformers gguf`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

sizes = {{"n_positions": {n_positions}, "n_inner": {n_inner}}}  # which transformers does not read from the file
model = AutoModelForCausalLM.from_pretrained({name}, gguf_file="model.gguf", **sizes)
tokenizer = AutoTokenizer.from_pretrained({name}, gguf_file="model.gguf")
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator({prompt}, max_new_tokens={new_tokens})[0]["generated_text"])
```

llama.cpp, and what is built on it, takes the file `model.gguf` as it is:

```bash
llama-completion -m model.gguf -p {shell_prompt} -n {new_tokens}
```"""
ONNX = """With ONNX Runtime (`pip install transformers onnxruntime`):

```python
from pathlib import Path

import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

name = {name}
folder = name if Path(name).is_dir() else snapshot_download(name)
config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/onnx/model.onnx")
names = [each.name for each in session.get_inputs() if each.name.startswith("past_key_values")]
nothing = np.zeros((1, config.n_head, 0, config.n_embd // config.n_head), np.float32)
past, text = dict.fromkeys(names, nothing), tokenizer({prompt})["input_ids"]
new, longest = text, len(text) + {new_tokens}
while len(text) < longest:
    inputs = {{
        "input_ids": np.array([new], np.int64),
        "attention_mask": np.ones((1, len(text)), np.int64),
        "position_ids": np.arange(len(text))[None, -len(new) :],
    }}
    logits, *present = session.run(None, inputs | past)
    new = [int(logits[0, -1].argmax())]  # greedy
    past, text = dict(zip(names, present)), text + new
print(tokenizer.decode(text))
```

Files, inputs and outputs are named as transformers.js and optimum name them. What was read before comes out as
`present.N.key` and `present.N.value`, (batch, heads, tokens, width of a head), and goes in as `past_key_values.N.key`
and `past_key_values.N.value`."""
REMOTE_CODE = """`trust_remote_code` runs the modeling code of this repository: read it first, and pin what you have
read by `revision="..."`, a commit of this repository, of its code and its weights alike."""
USAGE: dict[Format, str] = {
    "gpt2scratch": PIPELINE.replace("{trust}", ", trust_remote_code=True") + "\n\n" + REMOTE_CODE,
    "gpt2": PIPELINE.replace("{trust}", ""),
    "gguf": GGUF,
    "onnx": ONNX,
}
NAMES = {"gpt2": "a stock GPT-2", "gguf": "GGUF", "onnx": "ONNX"}
LIBRARY: dict[Format, str] = {"gpt2scratch": "transformers", "gpt2": "transformers", "gguf": "gguf", "onnx": "onnx"}


@dataclass(frozen=True)
class RunRecord:
    """
    What the model card tells of a run.

    Attributes:
        name: what to pass to `from_pretrained`: the run folder, or a Hub id.
        step, tokens, hours: what lies behind the weights, of `max_steps` steps.
        license: of the weights, as the Hub names it.
        settings: the flags that decided the result.
        sources: of the training text: name, configuration, revision and share of each.
        train_statistics, validation_statistics: counts of documents, tokens and bytes; of a stream's training text
            nobody knows them.
        evaluation, hellaswag: the last ones, keys as in metrics.jsonl, None if there was none.
        eval_tokens: how many of the validation text an evaluation is on, None for all.
        hellaswag_source: a dataset on the Hub, or the name of a file.
        compression: bits per byte that general-purpose compressors need for the validation text.
        prompts: one of which is for the example.
    """

    name: str
    parameters: int
    step: int
    max_steps: int
    tokens: int
    hours: float
    hardware: str
    mixed_precision: str
    license: str
    settings: dict
    sources: list[dict]
    train_statistics: dict | None
    validation_statistics: dict
    evaluation: dict[str, float] | None
    eval_tokens: int | None
    hellaswag: dict[str, float] | None
    hellaswag_source: str
    compression: dict[str, float]
    prompts: list[str]
    samples: list[str]
    versions: dict[str, str]


def model_card(record: RunRecord, config: PreTrainedConfig) -> ModelCard:
    title = title_of(record.name)
    start, base_model = record.settings["model_name_or_path"], None
    if start and Path(start).exists():
        start = Path(start).resolve().name  # no local path on a card
    elif start:
        base_model = start
    settings = {**record.settings, "model_name_or_path": start}
    made = f"trained further from `{start}`" if start else "trained from scratch"
    names = " and ".join(source["name"] for source in record.sources)
    unfinished = "" if record.step == record.max_steps else f" So far {record.step:,} of {record.max_steps:,} steps."
    sections = [
        f"---\n{_metadata(record, title, base_model)}\n---",
        f"# {title}",
        f"A GPT-2 of {record.parameters:,} parameters, {made} with gpt2scratch on {names}.{unfinished}",
        USE,
        usage("gpt2scratch", record.name, example_prompt(record.prompts, config), config),
        "## Evaluation",
        *_evaluation(record),
        "## Model",
        "A decoder-only transformer, as GPT-2 is: learned positions, pre-norm blocks of causal attention and a "
        "feed-forward network with GELU"
        + (", the output head tied to the token embeddings." if config.tie_word_embeddings else "."),
        _shape(record, config),
        "## Training",
        _training(record, settings),
        *(["## What it writes", *map(_fenced, record.samples)] if record.samples else []),
        "## Limits",
        f"It reads {config.n_positions:,} tokens at most, and knows nothing but what its training text is like, whose "
        "errors and prejudices it repeats. It has not been tuned to follow instructions, and nothing that it writes "
        "should be taken for a fact.",
        "## Licence",
        f"The weights: `{record.license}`. The code: MIT, as gpt2scratch is. The training text has terms of its own.",
        "Made with " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".",
    ]
    return ModelCard("\n\n".join(sections) + "\n")


def _metadata(record: RunRecord, title: str, base_model: str | None) -> ModelCardData:
    hub_names = [source["name"] for source in record.sources if "/" in source["name"]]
    return ModelCardData(
        license=record.license,
        library_name=LIBRARY["gpt2scratch"],
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2scratch"],
        datasets=list(dict.fromkeys(hub_names)) or None,
        base_model=base_model,
        model_name=title,
        eval_results=[*_validation_results(record), *_hellaswag_entries(record)] or None,
    )


def _shape(record: RunRecord, config: PreTrainedConfig) -> str:
    rows = [
        ("parameters", f"{record.parameters:,}"),
        ("layers", config.n_layer),
        ("width", config.n_embd),
        ("heads", config.n_head),
        ("positions", f"{config.n_positions:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    return table(("", "value"), rows)


def _training(record: RunRecord, settings: dict) -> str:
    rows = [
        *_data_rows(record),
        ("steps", f"{record.step:,}, of {record.tokens // record.step:,} tokens each"),
        ("hardware", record.hardware),
        ("time", duration(record.hours)),
        ("precision", "fp32" if record.mixed_precision == "no" else f"{record.mixed_precision} autocast"),
        *((f"`{key}`", value) for key, value in settings.items() if value is not None),
    ]
    return table(("", "value"), rows)


def usage(format: Format, name: str, prompt: str, config: PreTrainedConfig) -> str:
    """
    An example that works when it is pasted.

    Args:
        prompt: of at most half as many bytes, and so tokens, as the model has positions.
    """
    return USAGE[format].format(
        name=_quoted(name),
        prompt=_quoted(prompt),
        shell_prompt=shlex.quote(prompt),
        new_tokens=min(60, config.n_positions // 2),
        n_positions=config.n_positions,
        n_inner=config.n_inner,
    )


def example_prompt(prompts: list[str], config: PreTrainedConfig) -> str:
    """The first that leaves room for an answer, and that every reader of a format can begin with."""
    fitting = (prompt for prompt in prompts if 0 < len(prompt.encode()) <= config.n_positions // 2)
    return next(fitting, "The")


def converted_card(
    text: str | None,
    folder: Path,
    format: Format,
    config: PreTrainedConfig,
    outtype: str = "f32",
    license: str | None = None,
) -> ModelCard:
    """
    The card of a model in another format, made of its own: with an example for that format. All else stays, what
    people wrote there included.

    Args:
        text: of the model's card, None if it has none.
        folder: where the converted model is.
        outtype: the type of its matrices.
        license: of the weights, None to leave it.
    """
    card = renamed_card(text, str(folder), license)
    data: Any = card.data
    data.library_name = LIBRARY[format]
    data.pipeline_tag = "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or ["gpt2"]), *([format] if format != "gpt2" else [])]))
    prompt = re.search(rf"generator\(({STRING})", card.text)
    prompts = [json.loads(prompt[1])] if prompt else []
    converted = f"Converted to {NAMES[format]}, in {outtype}. The figures below were measured before that."
    section = f"{USE}\n\n{converted}\n\n{usage(format, str(folder), example_prompt(prompts, config), config)}\n\n"
    if USE_SECTION.search(card.text):
        card.text = USE_SECTION.sub(lambda _: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    return card


def renamed_card(text: str | None, name: str, license: str | None) -> ModelCard:
    """
    A card for a repository: its title and its examples have the repository's name, in place of the folder's.

    Args:
        text: of the card in the folder that is published, None if there is none.
        name: of the repository: a Hub id, or a folder.
        license: of the weights, None to leave it.

    Raises:
        UserError: if the metadata of the card is not valid.
    """
    title = title_of(name)
    card = _read(text if text is not None else f"# {title}\n")
    data: Any = card.data
    if data.model_name:
        heading = rf"^# {re.escape(data.model_name)}$"
        card.text = re.sub(heading, lambda _: f"# {title}", card.text, count=1, flags=re.M)
        data.model_name = title
    if license:
        card.text = card.text.replace(f"The weights: `{data.license}`.", f"The weights: `{license}`.")
        data.license = license
    use = USE_SECTION.search(card.text)
    if old := re.search(rf"(?:model=|from_pretrained\(|^name = )({STRING})", use[0] if use else card.text, flags=re.M):
        card.text = card.text.replace(old[1], _quoted(name))
    return card


def title_of(name: str) -> str:
    """The last part of a Hub id or a folder's path."""
    return (Path(name).resolve() if Path(name).is_dir() else Path(name)).name


def _quoted(text: str) -> str:
    """As a string in JSON, which Python reads as well."""
    return json.dumps(text, ensure_ascii=False)


def _read(text: str) -> ModelCard:
    if not text.startswith("---"):  # no metadata: what the Hub needs to know at least
        text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2]\n---\n\n{text}"
    try:
        return ModelCard(text)
    except (ValueError, TypeError, YAMLError) as error:
        raise UserError(f"{CARD} has metadata that is not valid: {one_line(error)}") from None


def problems_of_license(license: str | None) -> list[str]:
    """What is wrong with a licence's name: the Hub's are of small letters, digits, points, dashes."""
    if license is None or re.fullmatch(r"[a-z0-9.+-]+", license):
        return []
    return [f"--license {license} is not a name as the Hub has them, such as mit, apache-2.0 or cc-by-4.0"]


def hellaswag_results(summary: dict, source: str, split: str | None) -> list[EvalResult]:
    """
    The entries of a model card that the Hub shows.

    Args:
        summary: `protocol n acc acc_stderr acc_norm acc_norm_stderr`; accuracies are fractions.
        source: of the items: a dataset on the Hub, or the name of a file.
        split: of the dataset.
    """
    names = {"acc": "accuracy", "acc_norm": "accuracy, normalised by length"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name="HellaSwag" if source == HELLASWAG else source,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{name}, {summary['protocol']} protocol",
            metric_value=round(summary[metric], 4),
            metric_args={
                "protocol": summary["protocol"],
                "n": summary["n"],
                "stderr": summary[f"{metric}_stderr"] and round(summary[f"{metric}_stderr"], 4),
            },
        )
        for metric, name in names.items()
    ]


def update_model_card(name_or_path: str, results: list[EvalResult]) -> None:
    """
    Put results into the metadata of a model's card, README.md in its folder or on the Hub, in place of older ones of
    the same metrics on the same data.

    Raises:
        UserError: if the card cannot be read, or written.
    """
    path = Path(name_or_path) / CARD
    is_local = Path(name_or_path).is_dir()
    try:
        card = ModelCard.load(path if is_local else name_or_path)
        card.data.model_name = card.data.model_name or Path(name_or_path).resolve().name
        new = {(result.dataset_type, result.metric_name) for result in results}
        old = card.data.eval_results or []
        others = [result for result in old if (result.dataset_type, result.metric_name) not in new]
        card.data.eval_results = others + results
        if is_local:
            write_text(path, str(card))
        else:
            card.push_to_hub(name_or_path, commit_message="HellaSwag")
    except Exception as error:  # a refused token, no card, metadata that is not valid: of several libraries
        raise UserError(f"--update_model_card: the card of {name_or_path}: {one_line(error)}") from None


def duration(hours: float) -> str:
    """`42 seconds`, `3.4 minutes` or `17.2 hours`."""
    if hours < 2:
        return f"{hours * 60:.1f} minutes" if hours * 60 >= 2 else f"{hours * 3600:.0f} seconds"
    return f"{hours:.1f} hours"


def _validation_results(record: RunRecord) -> list[EvalResult]:
    if record.evaluation is None:
        return []
    names = {
        "loss": "validation loss, nats per token",
        "perplexity": "perplexity per token",
        "bits_per_byte": "bits per byte",
    }
    source, *others = record.sources
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="mixture" if others else source["name"],
            dataset_name=" and ".join(each["name"] for each in record.sources),
            dataset_config=None if others else source.get("config"),
            dataset_revision=None if others else source["revision"],
            dataset_split="validation",
            metric_type=metric,
            metric_name=name,
            metric_value=round(record.evaluation[f"eval_{metric}"], 4),
        )
        for metric, name in names.items()
    ]


def _hellaswag_summary(record: RunRecord) -> dict:
    """With standard errors of the mean of n items that are 0 or 1: sqrt(p (1 - p) / (n - 1))."""
    n = record.hellaswag["hellaswag_n"]
    summary = {"protocol": "completion", "n": n}
    for metric in ("acc", "acc_norm"):
        p = summary[metric] = record.hellaswag[f"hellaswag_{metric}"]
        summary[f"{metric}_stderr"] = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return summary


def _hellaswag_entries(record: RunRecord) -> list[EvalResult]:
    if record.hellaswag is None:
        return []
    split = "validation" if "/" in record.hellaswag_source else None
    return hellaswag_results(_hellaswag_summary(record), record.hellaswag_source, split)


def _evaluation(record: RunRecord) -> list[str]:
    evaluation, validation = record.evaluation, record.validation_statistics
    if evaluation is None:
        return ["Not evaluated yet."]
    rows = [
        ("loss, nats per token", f"{evaluation['eval_loss']:.4f}"),
        ("perplexity per token", f"{evaluation['eval_perplexity']:.2f}"),
        ("**bits per byte**", f"**{evaluation['eval_bits_per_byte']:.3f}**"),
        *((f"bits per byte of `{name}`, for comparison", f"{rate:.3f}") for name, rate in record.compression.items()),
    ]
    is_part = (record.eval_tokens or math.inf) < validation["tokens"]
    part = f"the first {record.eval_tokens:,} tokens of " if is_part else ""
    sections = [
        f"On {part}{validation['bytes']:,} bytes of text ({validation['documents']:,} documents) not trained on"
        + (":" if evaluation["step"] == record.step else f", after step {evaluation['step']:,}:"),
        table(("", "value"), rows),
        "![Training and validation loss](plots/loss.png)",
    ]
    if record.hellaswag is None:
        return sections
    summary = _hellaswag_summary(record)
    after = record.hellaswag["step"]
    rows = [
        (f"`{metric}`", f"{summary[metric]:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else ""))
        for metric in ("acc", "acc_norm")
        for stderr in [summary[f"{metric}_stderr"]]
    ]
    return [
        *sections,
        f"On {summary['n']:,} items of HellaSwag ({record.hellaswag_source}, the completion protocol of build-nanogpt "
        "and llm.c, zero-shot; chance is 0.25; ± one standard error)"
        + (":" if after == record.step else f", after step {after:,}:"),
        table(("", "accuracy"), rows),
        "![Accuracy on HellaSwag](plots/hellaswag.png)",
    ]


def _fenced(text: str) -> str:
    """As a block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _data_rows(record: RunRecord) -> list[tuple[str, str]]:
    rows = []
    for source in record.sources:
        share = f"{source['share']:.1%} of the rows: " if len(record.sources) > 1 else ""
        config = f", {source['config']}" if source.get("config") else ""
        revision = f", revision {source['revision']}" if source["revision"] else ""
        rows.append(("data", f"{share}{source['name']}{config}{revision}"))
    train = record.train_statistics
    if train is None:
        return [*rows, ("tokens seen", f"{record.tokens:,}")]
    return [
        *rows,
        ("training text", f"{train['documents']:,} documents, {train['bytes']:,} bytes"),
        ("tokens seen", f"{record.tokens:,} ({record.tokens / train['tokens']:.2f} epochs)"),
    ]
