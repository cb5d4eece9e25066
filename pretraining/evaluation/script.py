"""What the evaluation scripts share: flags for items and results, the launch, and the files of results."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pretraining import hardware
from pretraining.cli import flag, problems_of_range
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import check_launch, open_state
from pretraining.errors import UserError
from pretraining.files import unwritable, write_text
from pretraining.model_flags import LoadedModelFlags


@dataclass
class AmountFlags:
    _argument_group_name = "amount"

    limit: int | None = flag(None, "only the first so many items, of each task")
    per_device_eval_batch_size: int = flag(
        8, "items at once; of tasks, as many tokens as so many of the longest requests have"
    )

    def problems_of_amount(self) -> list[str]:
        return problems_of_range(self, ["per_device_eval_batch_size", "limit"], 1)


@dataclass
class ResultFlags:
    _argument_group_name = "results"

    output_file: str | None = flag(None, "a JSON file to write the result to")
    predictions_file: str | None = flag(None, "a JSON-lines file to write the scores of every item to")
    update_model_card: bool = flag(
        False, "put the result into the model's card and its .eval_results, in its folder or on the Hub"
    )

    def problems_of_results(self, model: LoadedModelFlags, limit: int | None) -> list[str]:
        """Return what can be known before an hour of scoring."""
        found, folder = [], Path(model.model_name_or_path or "")
        for name in ("output_file", "predictions_file"):
            if (value := getattr(self, name)) and (problem := unwritable(Path(value))):
                found.append(f"--{name} {value} {problem}")
        if self.output_file and self.predictions_file and Path(self.output_file) == Path(self.predictions_file):
            found.append(f"--output_file and --predictions_file are the same file, {self.output_file}")
        if self.update_model_card and limit:
            found.append("--update_model_card is for a result of all items, not for a --limit")
        if self.update_model_card and model.model_revision and not model.is_folder():
            found.append("--update_model_card is for the newest revision of a model, not for a --model_revision")
        if self.update_model_card and model.is_folder() and not (folder / "README.md").is_file():
            found.append(f"--update_model_card: {folder} has no README.md")
        return found

    def write(self, result: str, predictions: str) -> None:
        """
        Write the files that were asked for.

        Raises:
            UserError: for each that cannot be written; the other one is.
        """
        problems = []
        for path, content in ((self.predictions_file, predictions), (self.output_file, result)):
            try:
                if path:
                    write_text(Path(path), content)
            except OSError as error:
                problems.append(f"{path} cannot be written: {error.strerror}")
        if problems:
            raise UserError(*problems)


def open_accelerator() -> Accelerator:
    """Open the processes of the launch and their devices, in fp32 unless told otherwise, as published scores are."""
    state = open_state()
    check_launch(state.num_processes)
    if state.device.type == "cpu":
        hardware.keep_freed_memory()
    return Accelerator(cpu=state.device.type == "cpu", mixed_precision=told_precision() or "no")
