"""The final model: a folder that loads with the Auto classes and a pipeline, with its code, tokenizer and card."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pretraining.arguments import UserError, one_line
from pretraining.files import INCOMPLETE, write_text
from pretraining.publish_data import table

WEIGHTS = "model.safetensors"

# Of a run folder. No checkpoints, logs or trackers' files.
PUBLISHED = """config.json generation_config.json model*.safetensors* tokenizer*.json vocab.json merges.txt
    special_tokens_map.json added_tokens.json modeling_gpt2scratch.py configuration_gpt2scratch.py packing.py
    linear_cross_entropy.py README.md plots/*.png""".split()

USAGE = """```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}", trust_remote_code=True)
print(generator({prompt}, max_new_tokens=60)[0]["generated_text"])
```"""


@dataclass(frozen=True)
class RunRecord:
    """
    What the model card tells, all of it from the run's own records.

    Attributes:
        name: what to pass to `from_pretrained`: the run folder, or a Hub id.
        settings: the flags that decided the result.
        sources: of the training text: name, revision and share of each.
        train_statistics, validation_statistics: counts of documents, tokens and bytes; of a stream's training text
            nobody knows them.
        evaluation: the last evaluation, keys as in metrics.jsonl.
        compression: bits per byte that general-purpose compressors need for the validation text.
    """

    name: str
    parameters: int
    tokens: int
    steps: int
    hours: float
    hardware: str
    mixed_precision: str
    settings: dict
    sources: list[dict]
    train_statistics: dict | None
    validation_statistics: dict
    evaluation: dict[str, float]
    compression: dict[str, float]
    prompt: str
    samples: list[str]
    versions: dict[str, str]


def is_finished(output_dir: Path) -> bool:
    return (output_dir / WEIGHTS).is_file()


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: RunRecord, output_dir: Path, state_dict: dict
) -> None:
    """
    Write the final model into `output_dir`. The weights are put there last: where they are, the rest is whole.

    Args:
        state_dict: the full weights, gathered from all processes.
    """
    folder = output_dir / f"final{INCOMPLETE}"
    shutil.rmtree(folder, ignore_errors=True)
    n_positions = model.config.n_positions
    # A pipeline asks for 256 new tokens if a model does not say, which a small model may have no positions for.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(256, n_positions // 2),
    )
    tokenizer.model_max_length = n_positions
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    model_card(record, model).save(folder / "README.md")
    for path in sorted(folder.iterdir(), key=lambda path: path.name == WEIGHTS):
        os.replace(path, output_dir / path.name)
    folder.rmdir()


def push(output_dir: Path, repo_id: str) -> str:
    """
    Publish a finished run as a model on the Hub, in one commit. Returns its address.

    Raises:
        UserError: if the Hub refuses, or cannot be reached. There is no half of it then.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            allow_patterns=PUBLISHED,
            commit_message="Trained by gpt2scratch",
        )
    except Exception as error:  # a refused token, no network, a full repository: of several libraries
        raise UserError(f"--push_to_hub {repo_id} failed: {one_line(error)}") from None
    return f"{repo_id}, revision {commit.oid}"


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
            dataset_name="HellaSwag" if source == "Rowan/hellaswag" else source,
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
    path = Path(name_or_path) / "README.md"
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


def model_card(record: RunRecord, model: PreTrainedModel) -> ModelCard:
    config, validation = model.config, record.validation_statistics
    card_data = ModelCardData(
        language=None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2scratch"],
        model_name=Path(record.name).name,
    )
    start = record.settings["model_name_or_path"]
    made = f"trained further from `{start}`" if start else "trained from scratch"
    sections = [
        f"---\n{card_data}\n---",
        f"# {Path(record.name).name}",
        f"A GPT-2 of {record.parameters:,} parameters, {made} with gpt2scratch on "
        f"{' and '.join(source['name'] for source in record.sources)}.",
        USAGE.format(name=record.name, prompt=json.dumps(record.prompt, ensure_ascii=False)),
        "## Evaluation",
        f"On the {validation['bytes']:,} bytes of validation text ({validation['documents']:,} documents, not trained "
        "on):",
        table(("", "value"), _evaluation_rows(record)),
        "![Training and validation loss](plots/loss.png)",
        "## Model",
        table(
            ("", "value"),
            [
                ("layers", config.n_layer),
                ("width", config.n_embd),
                ("heads", config.n_head),
                ("positions", config.n_positions),
                ("vocabulary", f"{config.vocab_size:,}"),
                ("parameters", f"{record.parameters:,}"),
            ],
        ),
        "## Training",
        table(
            ("", "value"),
            [
                *_data_rows(record),
                ("steps", f"{record.steps:,} of {record.tokens // record.steps:,} tokens"),
                ("hardware", record.hardware),
                ("time", duration(record.hours)),
                ("precision", record.mixed_precision),
                *((f"`{key}`", value) for key, value in record.settings.items() if value is not None),
            ],
        ),
        "## What it writes",
        "\n\n".join(f"```text\n{sample}\n```" for sample in record.samples),
        "## Limits",
        "A language model repeats what its training text is like, errors and prejudices included. It has not been "
        "tuned to follow instructions, and nothing it writes should be taken for a fact.",
        "Made with " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".",
    ]
    return ModelCard("\n\n".join(sections) + "\n")


def _evaluation_rows(record: RunRecord) -> list[tuple[str, str]]:
    evaluation = record.evaluation
    return [
        ("loss, nats per token", f"{evaluation['eval_loss']:.4f}"),
        ("perplexity per token", f"{evaluation['eval_perplexity']:.2f}"),
        ("**bits per byte**", f"**{evaluation['eval_bits_per_byte']:.3f}**"),
        *((f"bits per byte of `{name}`, for comparison", f"{rate:.3f}") for name, rate in record.compression.items()),
    ]


def _data_rows(record: RunRecord) -> list[tuple[str, str]]:
    rows = []
    for source in record.sources:
        share = f"{source['share']:.1%} of the rows: " if len(record.sources) > 1 else ""
        rows.append(("data", f"{share}{source['name']}, revision {source['revision']}"))
    train = record.train_statistics
    if train is None:
        return [*rows, ("tokens seen", f"{record.tokens:,}")]
    return [
        *rows,
        ("training text", f"{train['documents']:,} documents, {train['bytes']:,} bytes"),
        ("tokens seen", f"{record.tokens:,} ({record.tokens / train['tokens']:.2f} epochs)"),
    ]
