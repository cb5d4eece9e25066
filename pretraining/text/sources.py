"""Sources of text and rows, as flags and recipes name them."""

import contextlib
from dataclasses import dataclass, fields

import yaml

from pretraining.cli import flag, problems_of_paths, problems_of_range
from pretraining.errors import UserError, nearest, one_line


@dataclass
class TextSource:
    """A dataset on the Hub, or files of text."""

    dataset_name: str | None = flag(None, "a dataset on the Hugging Face Hub")
    dataset_config_name: str | None = flag(None, "its configuration, such as sample-10BT")
    dataset_revision: str | None = flag(None, "the commit, tag or branch of it to read")
    train_file: str | None = flag(None, "files, as a glob: .txt (a document a file), .jsonl or .parquet")
    validation_file: str | None = flag(None, "files for validation; else a part of the training text is kept back")
    text_column: str = flag("text", "the column that holds the text")

    def problems_of_text(self) -> list[str]:
        """Return a message for each flag that is given without the flag that it needs."""
        found = []
        if (self.dataset_config_name or self.dataset_revision) and not self.dataset_name:
            found.append("--dataset_config_name and --dataset_revision need --dataset_name")
        if self.validation_file and not self.train_file:
            found.append("--validation_file needs --train_file")
        return found


@dataclass
class TextFlags(TextSource):
    """The flags of a script that reads text."""

    validation_split_percentage: int = flag(5, "percentage of the documents that is kept back for validation")

    def problems_of_split(self) -> list[str]:
        return problems_of_range(self, ["validation_split_percentage"], 1, 50)


@dataclass
class Source(TextSource):
    """
    One entry under `mixture:` in a recipe, or the one source that the flags of the same names give.

    Attributes:
        max_train_files: how many token files of a dataset on the Hub to train on, in the order of their names.
        weight: share of the rows, and so of the tokens, relative to the other sources' weights.
    """

    data_dir: str | None = None
    max_train_files: int | None = None
    weight: float = 1.0

    @classmethod
    def of(cls, args: object) -> "Source":
        """The one that flags name."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)})

    @property
    def name(self) -> str:
        return self.data_dir or self.dataset_name or self.train_file or "a source without a name"

    def problems(self, streaming: bool) -> list[str]:
        """What is wrong with it by itself, to train on: an empty list if nothing is."""
        found = self.problems_of_text() + problems_of_paths(self)
        if sum(map(bool, (self.data_dir, self.dataset_name, self.train_file))) != 1:
            found.append("give one of --data_dir, --dataset_name and --train_file")
        if self.data_dir and streaming:
            found.append(f"--data_dir {self.data_dir} is packed already: leave --streaming out")
        if self.train_file and not streaming:
            found.append("--train_file is text: add --streaming, or pack it first with prepare_data.py")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("weight", "max_train_files") and not isinstance(value, str | None):
                found.append(f"{field.name} of a source must be a text, got {value}")
        files = self.max_train_files
        if files is not None and (type(files) is not int or files < 1):
            found.append(f"--max_train_files must be at least 1, got {files}")
        if files is not None and (streaming or not self.dataset_name):
            found.append("--max_train_files is for a --dataset_name of token files, without --streaming")
        if not isinstance(self.weight, float) or not 0 < self.weight < float("inf"):
            found.append(f"the weight of {self.name} must be a number above 0, got {self.weight}")
        return found


def parse_mixture(entries: list[str]) -> list[Source]:
    """
    Args:
        entries: each a YAML mapping of the names in `Source`, `{data_dir: data/web, weight: 0.7}`.

    Raises:
        UserError: with everything that is no such mapping, or names what a source does not have.
    """
    names = [field.name for field in fields(Source)]
    sources, problems = [], []
    for entry in entries:
        try:
            values = yaml.safe_load(entry)
        except yaml.YAMLError as error:
            problems.append(f"--mixture {entry}: not valid YAML: {one_line(error)}")
            continue
        if not isinstance(values, dict):
            problems.append(f"--mixture {entry}: each source is a mapping, as {{data_dir: data/web, weight: 0.7}}")
            continue
        with contextlib.suppress(TypeError, ValueError):  # YAML takes 1e-05 for a text
            values["weight"] = float(values.get("weight", 1.0))
        unknown = [str(key) for key in values if key not in names]
        problems += [f"--mixture: a source has no '{key}'{nearest(key, names)}" for key in unknown]
        if not unknown:
            sources.append(Source(**values))
    if problems:
        raise UserError(*problems)
    return sources
