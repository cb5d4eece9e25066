"""The lines of metrics.jsonl and events.jsonl: JSON objects, a line each, appended while a run goes on."""

import json
import math
from pathlib import Path

from pretraining.errors import ProcessError
from pretraining.files import write_text
from pretraining.records.run_files import METRICS

CLOCK = ("step", "tokens", "elapsed_seconds")  # of every line of metrics.jsonl
EVALUATIONS = {"eval_loss", "hellaswag_n", "eval_tasks_n"}  # one of these is in each line that an evaluation writes


def is_of_hellaswag(line: dict) -> bool:
    """Return True for a line of --hellaswag_steps. The harness's task of that name has the same keys, and more."""
    return "hellaswag_n" in line and "eval_tasks_n" not in line


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
    """
    Return the lines of metrics.jsonl, but for a last one that is just being written, and what a crash of the machine
    left in it.
    """
    path = output_dir / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = [_parse(line) for line in lines if line.endswith("\n")]
    return [line for line in found if line is not None and _is_of_metrics(line)]


def truncate(path: Path, last_step: int, is_due: bool) -> None:
    """
    Drop the lines after `last_step`, those of its evaluations if they are still due, and what a run or machine that
    ended suddenly left unfinished.
    """
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        line = _parse(text)
        if line is None:
            continue
        is_evaluation = not EVALUATIONS.isdisjoint(line)
        if line["step"] < last_step or (line["step"] == last_step and not (is_due and is_evaluation)):
            kept.append(text + "\n")
    write_text(path, "".join(kept))


def _parse(text: str) -> dict | None:
    """Return a line, or None if it is not one that this program writes."""
    try:
        line = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_of_metrics(line: dict) -> bool:
    clock = all(type(line.get(name)) in (int, float) for name in CLOCK)
    return clock and all(value is None or type(value) in (int, float) for value in line.values())


def finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
