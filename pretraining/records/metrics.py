"""The lines of metrics.jsonl and events.jsonl: JSON objects, a line each, appended while a run goes on."""

import json
import math
from pathlib import Path

from pretraining.errors import ProcessError
from pretraining.files import write_text
from pretraining.records.run_files import METRICS

CLOCK = ("step", "tokens", "elapsed_seconds")  # of every line of metrics.jsonl
EVALUATIONS = {"eval_loss", "hellaswag_n"}  # one of these is in each line that an evaluation writes


def append_line(path: Path, values: dict) -> None:
    """
    Raises:
        ProcessError: if the file cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:  # of the last checkpoint, all is there
        raise ProcessError(f"{path} cannot be written: {error.strerror}") from error


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, but for a last one that is just being written."""
    path = output_dir / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(path: Path, last_step: int, is_due: bool) -> None:
    """
    Drop the lines after `last_step`, those of its evaluations if they are still due, and a last line that a killed run
    left unfinished.
    """
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        is_evaluation = not EVALUATIONS.isdisjoint(line)
        if line["step"] < last_step or (line["step"] == last_step and not (is_due and is_evaluation)):
            kept.append(text + "\n")
    write_text(path, "".join(kept))


def finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
