"""
position.json of a checkpoint: where a run stood between two steps, but for weights, optimizers and random generators.
Its keys are the attributes of `Position`, beside `format_version`.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pretraining.arguments import UserError
from pretraining.files import write_text

POSITION_FILE = "position.json"
FORMAT_VERSION = 1  # files without one are of version 1


@dataclass(frozen=True)
class Position:
    """
    Attributes:
        step: optimizer steps done.
        elapsed_seconds: that all starts of the program together took for them.
        is_due: the evaluations that `step` asks for are still to be done, as a signal came in between.
        identity: of the run, see `identity.identity`.
        anomalies: see `Anomalies.state`.
        streams: where the stream of each process stood, None for packed rows, whose order is a function of the step.
            A process by itself knows its own alone.
    """

    step: int
    elapsed_seconds: float
    is_due: bool
    identity: dict
    anomalies: dict
    streams: list[dict | None]

    def write(self, folder: Path) -> None:
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_text(folder / POSITION_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Position":
        """
        Raises:
            UserError: if the file is of another version, or is no position.
        """
        try:
            content = json.loads((folder / POSITION_FILE).read_text(encoding="utf-8"))
            position = cls(**{field.name: content[field.name] for field in fields(cls)})
            is_sound = content.get("format_version", FORMAT_VERSION) == FORMAT_VERSION and position._is_sound()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_sound = False
        if not is_sound:
            raise UserError(f"{folder} is of another version of this program, whose checkpoints are other ones")
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
