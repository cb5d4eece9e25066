"""
Write docs/benchmarks.md: run benchmarks, and put what each prints in the place of what it printed before.

    python benchmarks/report.py                                 # make bench: all that need nothing but this repository
    python benchmarks/report.py hellaswag --data_file hellaswag_val.jsonl       # one of them, with flags of its own

A benchmark's place is between the lines `<!-- name -->` and `<!-- /name -->`. The text around it is written by hand.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
# Those of `make bench`, about two hours on two cores. The others are of texts that are not in this repository, or take
# hours of their own.
USUAL = "training_step training_loop head_and_loss generation start_up checkpoints".split()
BY_NAME = "data harness hellaswag optimizers".split()


def replace_section(page: str, name: str, text: str) -> str:
    """
    Raises:
        ValueError: if the page has no place for it, or several.
    """
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page, count = place.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", page)
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} places <!-- {name} -->, instead of one")
    return page


def main(words: list[str]) -> int:
    names, flags = (words[:1], words[1:]) if words else (USUAL, [])
    if unknown := set(names) - {*USUAL, *BY_NAME}:
        print(f"report.py: error: no benchmark {', '.join(unknown)}: {', '.join(USUAL + BY_NAME)}", file=sys.stderr)
        return 2
    failed = []
    for name in names:
        replace_section(PAGE.read_text(), name, "")  # now, not when it has been run
        print(f"== {name}", file=sys.stderr, flush=True)
        result = subprocess.run([sys.executable, FOLDER / f"{name}.py", *flags], stdout=subprocess.PIPE, text=True)
        if result.returncode or not result.stdout.strip():
            failed.append(name)
        else:
            PAGE.write_text(replace_section(PAGE.read_text(), name, result.stdout))
    if failed:
        print(f"report.py: {', '.join(failed)} failed: their figures are the old ones", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
