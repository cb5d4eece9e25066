"""
Run everything that needs a GPU in a few minutes: the GPU tests, and the speed of training, scoring and generation.

    python benchmarks/gpu.py                        # into docs/benchmarks.md; 8 minutes at most
    python benchmarks/gpu.py --minutes 20           # for a slower GPU
    python benchmarks/gpu.py --dry_run              # tiny shapes on the CPU, into no file

It needs torch, transformers and accelerate, and for the tests pytest. The parts (`gpu_parts.py`) run in the order of
their importance, each in a process of its own with a time limit; in a dry run, all in one process. Each line is
printed, and written into the page's section "On a GPU", as soon as it is known, so that a run that is cut off leaves
what it had measured. The exit status is 1 if a part failed or ran out of time.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import FOLDER, PAGE, replace_section
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.errors import UserError

TESTS = "GPU tests"
# The time of each part in 8 minutes. The time that a part does not use is left to the next ones.
SECONDS = {
    TESTS: 120,
    "Training step": 200,
    "The whole loop": 55,
    "Head and loss": 30,
    "HellaSwag": 35,
    "Generation": 40,
}
NAME = "gpu"  # of the place in the page


@dataclass
class BenchmarkArguments:
    minutes: float = flag(8.0, "the time that all parts together may take")
    dry_run: bool = flag(False, "tiny shapes on the CPU, to see that everything runs")
    output_file: str = flag(
        None, f"the page to write into, where it has a place <!-- {NAME} -->; docs/benchmarks.md unless in a dry run"
    )
    parts: list[str] = flag([], "run these parts, in this process", nargs="+")

    def problems(self) -> list[str]:
        found = []
        if self.minutes <= 0:
            found.append(f"--minutes must be above 0, got {self.minutes}")
        for part in self.parts:
            if part not in SECONDS:
                found.append(f"--parts must be among {', '.join(SECONDS)}, got {part}")
        return found


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        seconds: the time that the part may take, relative to the other parts.
        command: a program that prints Markdown, from the heading on.
    """

    title: str
    seconds: float
    command: list[str]


class Report:
    """The lines that are known so far, printed and written into a page, if there is one, as they come."""

    def __init__(self, page: Path | None):
        self.page = page
        self.lines: list[str] = []
        if page and not page.exists():
            page.write_text(f"<!-- {NAME} -->\n<!-- /{NAME} -->\n", encoding="utf-8")
        if page:
            replace_section(page.read_text(encoding="utf-8"), NAME, "")  # an error now, not after the first part

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.page:
            text = self.page.read_text(encoding="utf-8")
            self.page.write_text(replace_section(text, NAME, "\n".join(self.lines)), encoding="utf-8")


def run_parts(parts: list[Part], seconds: float, report: Report) -> list[str]:
    """
    Run all parts, within so many seconds.

    Returns:
        The titles of those that failed.
    """
    started, allowed, failed = time.monotonic(), 0.0, []
    for part in parts:
        allowed += seconds * part.seconds / sum(each.seconds for each in parts)
        problem = run_part(part.command, started + allowed - time.monotonic(), report.add)
        if problem:
            failed.append(part.title)
            report.add(*([""] if report.lines and report.lines[-1] else []), f"{part.title} {problem}")
        report.add("")
    return failed


def run_part(command: list[str], limit: float, add: Callable[[str], None]) -> str | None:
    """
    Run a command, and hand on each line that it prints.

    Returns:
        What went wrong, to follow the part's title, None if nothing did.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    errors: list[str] = []

    def add_error(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if line.strip():
            errors.append(line)

    sinks = [(process.stdout, add), (process.stderr, add_error)]
    threads = [threading.Thread(target=hand_on, args=sink, daemon=True) for sink in sinks]
    for thread in threads:
        thread.start()
    status = None
    try:
        status = process.wait(max(0, limit))
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
        process.wait()
    for thread in threads:
        thread.join(5)
    if status is None:
        return f"ran out of time after {limit:.0f} seconds."
    return f"failed with status {status}: {errors[-1] if errors else 'it printed no error'}" if status else None


def hand_on(stream: Iterable[str], add: Callable[[str], None]) -> None:
    for line in stream:
        add(line.rstrip("\n"))


def gpu_tests() -> int:
    """Run the GPU tests, and print what came of them. Returns an exit status."""
    if find_spec("pytest") is None:
        print("Not run: pytest is not installed.")
        return 0
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    lines = ["it printed nothing"]
    with subprocess.Popen(command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line.strip())
    print(f"`tests/test_gpu.py`: {lines[-1].strip('= ')}.")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"- {line}")
    return process.returncode


def run_here(titles: list[str], dry_run: bool) -> int:
    """Run parts one after the other, in this process. Returns an exit status."""
    for title in titles:
        print(*([""] if title != titles[0] else []), f"### {title}", "", sep="\n", flush=True)
        if title == TESTS:
            if status := gpu_tests():
                return status
        else:
            from benchmarks import gpu_parts  # here, as it takes seconds

            gpu_parts.PARTS[title](gpu_parts.TINY if dry_run else gpu_parts.GPT2)
    return 0


def check_for_gpu() -> None:
    import torch  # here, as it takes seconds that a dry run does without

    if not torch.accelerator.is_available():
        raise UserError("no GPU was found: --dry_run runs everything on the CPU, with tiny shapes")


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if args.parts:
        sys.exit(run_here(args.parts, args.dry_run))
    page = args.output_file or (None if args.dry_run else PAGE)
    if args.dry_run:
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    else:
        check_for_gpu()
    command = [sys.executable, __file__, "--parts"]
    parts = [Part(title, seconds, [*command, title]) for title, seconds in SECONDS.items()]
    if args.dry_run:  # there is no memory to fill, and each process takes seconds to start
        parts = [Part("Dry run", 1, [*command, *SECONDS, "--dry_run"])]
    failed = run_parts(parts, args.minutes * 60, Report(page and Path(page)))
    if failed:
        print(f"gpu.py: {', '.join(failed)} failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
