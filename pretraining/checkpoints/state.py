"""
position.json of a checkpoint: where a run stood between two steps, but for weights, optimizers and random generators.
Its keys are the attributes of `Position` but for the generators, and `format_version`, that of the whole checkpoint.
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from pretraining.errors import UserError
from pretraining.files import write_text

POSITION_FILE = "position.json"
# Of all files of a checkpoint, and of what the position of a stream means. Those without one are of version 1.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Position:
    """
    Attributes:
        step: optimizer steps done.
        elapsed_seconds: that all starts of the program together took for them.
        is_due: the evaluations that `step` asks for are still to be done, as a signal came in between.
        identity: of the run, see `identity.identity`.
        anomalies: see `BadSteps.state`.
        streams: where the stream of each process stood, None for packed rows, whose order is a function of the step.
            A process by itself knows its own alone.
        generators: states of this process's random generators, which rng.pt holds, and position.json does not.
    """

    step: int
    elapsed_seconds: float
    is_due: bool
    identity: dict
    anomalies: dict
    streams: list[dict | None]
    generators: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in KEYS}}
        write_text(folder / POSITION_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Position":
        """
        Raises:
            UserError: if the checkpoint is of another version, or the file is no position.
        """
        path, version, is_sound = folder / POSITION_FILE, FORMAT_VERSION, False
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.get("format_version", 1)
            position = cls(**{name: content.get(name) for name in KEYS})
            is_sound = position._is_sound()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        if version != FORMAT_VERSION:
            raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}")
        if not is_sound:
            raise UserError(f"{path} is damaged, or of another program: it is no position of a run")
        return position

    def _is_sound(self) -> bool:
        return (
            type(self.step) is int
            and self.step > 0
            and type(self.elapsed_seconds) is float
            and type(self.is_due) is bool
            and isinstance(self.identity, dict)
            and all(type(loss) is float for loss in self.anomalies["recent"])
            and isinstance(self.streams, list)
            and len(self.streams) > 0
        )

    def of_process(self, index: int) -> "Position":
        """As one process has it. Of another number of processes than before, only packed rows can be gone on with."""
        return replace(self, streams=[self.streams[index % len(self.streams)]])


KEYS = [each.name for each in fields(Position) if each.name != "generators"]  # of position.json
