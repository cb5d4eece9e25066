"""The model card: what a run was, how good its model is and how to use it, from the run's own records."""

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from pretraining import hardware
from pretraining.checkpoints.state import Position
from pretraining.cli import format_settings
from pretraining.data.training_data import TrainingData
from pretraining.errors import counted
from pretraining.files import write_text
from pretraining.hub import LICENSE
from pretraining.markdown import table
from pretraining.publishing.eval_results import card_entries, result_files
from pretraining.publishing.usage import example_prompt, usage
from pretraining.records.metrics import is_of_hellaswag, read_metrics
from pretraining.records.progress import duration
from pretraining.records.run_files import HELLASWAG_PLOT, LOSS_PLOT, TASKS_PLOT
from pretraining.records.task_results import TaskResult, TaskSource, task_results
from pretraining.training.flags import TrainArguments

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
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
        evaluation, hellaswag, tasks: the last ones, keys as in metrics.jsonl, None if there was none.
        eval_tokens: how many of the validation text an evaluation is on, None for all.
        task_sources: what HellaSwag and the tasks are on.
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
    tasks: dict[str, float] | None
    task_sources: list[TaskSource]
    compression: dict[str, float]
    prompts: list[str]
    samples: list[str]
    versions: dict[str, str]

    def hellaswag_results(self) -> list[TaskResult]:
        sources = [source for source in self.task_sources if "protocol" in source.details]
        return task_results(sources, self.hellaswag or {})

    def task_results(self) -> list[TaskResult]:
        sources = [source for source in self.task_sources if "protocol" not in source.details]
        return task_results(sources, self.tasks or {})


def model_card(record: RunRecord, config: PreTrainedConfig) -> ModelCard:
    """Fill the template. Its words are there; here are the values that need more than a name."""
    start, base_model = record.settings["model_name_or_path"], None
    if start and Path(start).exists():
        start = Path(start).resolve().name  # no local path on a card
    elif start:
        base_model = start
    title = title_of(record.name)
    return ModelCard.from_template(
        card_data=_metadata(record, title, base_model),
        template_path=str(TEMPLATE),
        model_name=title,
        parameters=f"{record.parameters:,}",
        origin=f"trained further from `{start}`" if start else "trained from scratch",
        source_names=" and ".join(source["name"] for source in record.sources),
        step=f"{record.step:,}",
        max_steps=f"{record.max_steps:,}",
        usage=usage("gpt2scratch", record.name, example_prompt(record.prompts, config), config),
        evaluation=record.evaluation,
        evaluation_text=_evaluation_text(record),
        evaluation_step=_after(record.evaluation, record.step),
        compression=record.compression,
        loss_plot=LOSS_PLOT,
        hellaswag=record.hellaswag_results(),
        hellaswag_step=_after(record.hellaswag, record.step),
        hellaswag_plot=HELLASWAG_PLOT,
        tasks=record.task_results(),
        tasks_step=_after(record.tasks, record.step),
        tasks_plot=TASKS_PLOT,
        config=config,
        positions=f"{config.n_positions:,}",
        vocabulary=f"{config.vocab_size:,}",
        training_table=_training_table(record, {**record.settings, "model_name_or_path": start}),
        samples=list(map(_fenced, record.samples)),
        license=record.license,
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
    )


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
        eval_results=[
            *_validation_results(record),
            *card_entries(record.hellaswag_results() + record.task_results()),
        ]
        or None,
    )


def _training_table(record: RunRecord, settings: dict) -> str:
    rows = [
        *_data_rows(record),
        ("steps", f"{record.step:,}, of {record.tokens // record.step:,} tokens each"),
        ("hardware", record.hardware),
        ("time", duration(record.hours)),
        ("precision", "fp32" if record.mixed_precision == "no" else f"{record.mixed_precision} autocast"),
        *((f"`{key}`", format_settings(value)) for key, value in settings.items() if value not in (None, {})),
    ]
    return table(("", "value"), rows)


def title_of(name: str) -> str:
    """The last part of a Hub id or a folder's path."""
    return (Path(name).resolve() if Path(name).is_dir() else Path(name)).name


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


def _evaluation_text(record: RunRecord) -> str:
    """Return which text the model is evaluated on."""
    validation = record.validation_statistics
    is_part = (record.eval_tokens or math.inf) < validation["tokens"]
    part = f"the first {record.eval_tokens:,} tokens of " if is_part else ""
    return f"{part}{validation['bytes']:,} bytes of text ({counted(validation['documents'], 'document')})"


def _after(evaluation: dict | None, step: int) -> str:
    """Return the step of an evaluation, if it is another than the model's."""
    return f", after step {evaluation['step']:,}" if evaluation and evaluation["step"] != step else ""


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
    if train["documents"] is not None:  # nobody has counted those of files that are downloaded while training
        rows.append(("training text", f"{counted(train['documents'], 'document')}, {train['bytes']:,} bytes"))
    return [*rows, ("tokens seen", f"{record.tokens:,} ({record.tokens / train['tokens']:.2f} epochs)")]


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
        task_sources: what HellaSwag and the tasks are on.
    """

    args: TrainArguments
    accelerator: Accelerator
    data: TrainingData
    config: PreTrainedConfig
    parameters: int
    tokens_per_step: int
    repo_id: str | None
    task_sources: list[TaskSource] = field(default_factory=list)

    def record_at(self, step: int, elapsed_seconds: float, samples: Sequence[str] = ()) -> RunRecord:
        """Return what to tell of the model after `step`, which all starts of the program together took so long for."""
        args = self.args
        lines = [line for line in read_metrics(Path(args.output_dir)) if line["step"] <= step]
        return RunRecord(
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
            evaluation=next((line for line in reversed(lines) if line.get("eval_loss") is not None), None),
            eval_tokens=args.eval_iters and args.eval_iters * self.tokens_per_step,
            hellaswag=next((line for line in reversed(lines) if is_of_hellaswag(line)), None),
            tasks=next((line for line in reversed(lines) if "eval_tasks_n" in line), None),
            task_sources=self.task_sources,
            compression=self.data.validation.compression_rates,
            prompts=args.sample_prompts,
            samples=list(samples),
            versions={"Python": platform.python_version(), **_versions()},
        )

    def write(self, folder: Path, step: int, elapsed_seconds: float, samples: Sequence[str] = ()) -> None:
        """Write the card and the files of evaluation results into a folder. Args: see `record_at`."""
        record = self.record_at(step, elapsed_seconds, samples)
        model_card(record, self.config).save(folder / CARD)
        for name, text in result_files(record.hellaswag_results() + record.task_results()).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, text)

    def write_checkpoint(self, folder: Path, position: Position) -> None:
        """Write those of a checkpoint's model."""
        self.write(folder, position.step, position.elapsed_seconds)
