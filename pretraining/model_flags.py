"""The flags that name a model, of the scripts that load one."""

from dataclasses import dataclass
from pathlib import Path

from pretraining.cli import flag


@dataclass
class LoadedModelFlags:
    _argument_group_name = "model"

    model_name_or_path: str = flag(None, "the model, with its tokenizer: a folder, or a name on the Hub (required)")
    model_revision: str | None = flag(None, "branch, tag or commit of a model on the Hub")
    trust_remote_code: bool = flag(False, "run the modeling code that comes with the model; read it first")

    def problems_of_model(self) -> list[str]:
        found = []
        if not self.model_name_or_path:
            found.append("--model_name_or_path is required: a folder, or a name on the Hub")
        if self.is_folder() and self.model_revision:
            found.append(f"--model_revision is for a model on the Hub, {self.model_name_or_path} is a folder")
        return found

    def is_folder(self) -> bool:
        return bool(self.model_name_or_path) and Path(self.model_name_or_path).is_dir()
