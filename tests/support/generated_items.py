"""Items in HellaSwag's own format, made up of words from the standard library."""

import json
import random
import re
import textwrap
from pathlib import Path

TEXT = Path(textwrap.__file__).read_text(encoding="utf-8")


def generated_records(count: int) -> list[dict]:
    """Items of very different lengths, in the original format, with the oddities that the real ones have."""
    choose = random.Random(0)
    words = sorted(set(re.findall("[A-Za-z]+", TEXT)))

    def sentence(least: int, most: int) -> str:
        return " ".join(choose.choices(words, k=choose.randint(least, most))) + "."

    records = []
    for number in range(count):
        ctx_a, ctx_b = sentence(1, 12), choose.choice(["", "the Man", "then  she"])
        endings = [sentence(1, 9) for _ in range(4)]
        if number % 3 == 0:  # as those from WikiHow; the last one leaves a space at the end of the context
            ctx_a = f"[header] How to {ctx_a} [title] {sentence(1, 3)} [step]"
            endings = [f"{ending} [substeps] Café  {sentence(1, 3)}" for ending in endings]
            ctx_b = ctx_b if number % 2 else ""
        records.append(
            {
                "ind": 1000 - 7 * number,
                "activity_label": sentence(1, 2)[:-1],
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}".strip(),
                "endings": endings,
                "label": choose.randrange(4),
                "source_id": "left out",
            }
        )
    return records


def write_items(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
