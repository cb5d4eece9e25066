"""The model card: what a run was, how good its model is and how to use it, from the run's own records."""

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from pretraining import hardware
from pretraining.checkpoints.state import Position
from pretraining.data.training_data import TrainingData
from pretraining.errors import counted
from pretraining.evaluation.hellaswag_items import HELLASWAG
from pretraining.hub import LICENSE
from pretraining.markdown import table
from pretraining.publishing.usage import example_prompt, usage
from pretraining.records.metrics import read_metrics
from pretraining.records.progress import duration
from pretraining.records.run_files import HELLASWAG_PLOT, LOSS_PLOT
from pretraining.training.flags import TrainArguments

CARD = "README.md"
USE = "## Use it"


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
        library_name="transformers",
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


def title_of(name: str) -> str:
    """The last part of a Hub id or a folder's path."""
    return (Path(name).resolve() if Path(name).is_dir() else Path(name)).name


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


def _hellaswag_summary(hellaswag: dict[str, float]) -> dict:
    """Return what `hellaswag_scoring.summarise` gave, from its line of metrics.jsonl; older lines have no errors."""
    names = ("n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    return {"protocol": "completion"} | {name: hellaswag.get(f"hellaswag_{name}") for name in names}


def _hellaswag_entries(record: RunRecord) -> list[EvalResult]:
    if record.hellaswag is None:
        return []
    split = "validation" if "/" in record.hellaswag_source else None
    return hellaswag_results(_hellaswag_summary(record.hellaswag), record.hellaswag_source, split)


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
    documents = counted(validation["documents"], "document")
    sections = [
        f"On {part}{validation['bytes']:,} bytes of text ({documents}) not trained on"
        + (":" if evaluation["step"] == record.step else f", after step {evaluation['step']:,}:"),
        table(("", "value"), rows),
        f"![Training and validation loss]({LOSS_PLOT})",
    ]
    if record.hellaswag is None:
        return sections
    summary = _hellaswag_summary(record.hellaswag)
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
        f"![Accuracy on HellaSwag]({HELLASWAG_PLOT})",
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
        ("training text", f"{counted(train['documents'], 'document')}, {train['bytes']:,} bytes"),
        ("tokens seen", f"{record.tokens:,} ({record.tokens / train['tokens']:.2f} epochs)"),
    ]


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")  # whose versions the card tells


def _versions() -> dict[str, str]:
    """Return the versions of what is installed; token files of other projects are trained on without `datasets`."""
    return {name: version(name) for name in PACKAGES if find_spec(name)}


@dataclass(frozen=True)
class RunCard:
    """
    Attributes:
        parameters: how many the model has.
        tokens_per_step: of all processes together.
        repo_id: where the run is published, None if it is not.
    """

    args: TrainArguments
    accelerator: Accelerator
    data: TrainingData
    config: PreTrainedConfig
    parameters: int
    tokens_per_step: int
    repo_id: str | None

    def at(self, step: int, elapsed_seconds: float, samples: Sequence[str] = ()) -> ModelCard:
        """The card of the model after `step`, which all starts of the program together took so long for."""
        args = self.args
        lines = [line for line in read_metrics(Path(args.output_dir)) if line["step"] <= step]
        record = RunRecord(
            name=self.repo_id or args.output_dir,
            parameters=self.parameters,
            step=step,
            max_steps=args.max_steps,
            tokens=step * self.tokens_per_step,
            hours=elapsed_seconds / 3600,
            hardware=hardware.device_description(self.accelerator.device, self.accelerator.num_processes),
            mixed_precision=self.accelerator.mixed_precision,
            license=args.license or LICENSE,
            settings=args.settings(),
            sources=self.data.sources,
            train_statistics=self.data.statistics,
            validation_statistics=self.data.validation.statistics,
            evaluation=next((line for line in reversed(lines) if "eval_loss" in line), None),
            eval_tokens=args.eval_iters and args.eval_iters * self.tokens_per_step,
            hellaswag=next((line for line in reversed(lines) if "hellaswag_n" in line), None),
            hellaswag_source=Path(args.hellaswag_file).name if args.hellaswag_file else HELLASWAG,
            compression=self.data.validation.compression_rates,
            prompts=args.sample_prompts,
            samples=list(samples),
            versions={"Python": platform.python_version(), **_versions()},
        )
        return model_card(record, self.config)

    def write(self, folder: Path, position: Position) -> None:
        """Into a folder with a checkpoint's model."""
        self.at(position.step, position.elapsed_seconds).save(folder / CARD)
