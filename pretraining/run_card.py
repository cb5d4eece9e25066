"""The model card of a run, at any of its steps, from what the run has written down."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig

from pretraining import hardware
from pretraining.metrics import read_metrics
from pretraining.model_card import CARD, HELLASWAG, LICENSE, RunRecord, model_card
from pretraining.position import Position
from pretraining.sources import TrainingData
from pretraining.training_arguments import TrainArguments

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
