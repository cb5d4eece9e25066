"""The metric as a Space on the Hub."""

import json
from pathlib import Path

import evaluate
import gradio

EXAMPLE = """\
{"predictions": [-9.0, -8.0, -30.0, -31.0], "lengths": [6, 2, 10, 10], "references": 0}
{"predictions": [-20.0, -21.0, -22.0, -5.0], "lengths": [10, 10, 10, 10], "references": 3}
"""

metric = evaluate.load(str(Path(__file__).with_name("hellaswag.py")))


def compute(text: str) -> dict[str, float | None]:
    try:
        items = [json.loads(line) for line in text.splitlines() if line.strip()]
        return metric.compute(**{name: [item[name] for item in items] for name in metric.features})
    except (KeyError, TypeError, ValueError) as error:
        raise gradio.Error(f"{type(error).__name__}: {error}") from None


gradio.Interface(
    fn=compute,
    inputs=gradio.Textbox(EXAMPLE, lines=8, label="an item a line, as JSON"),
    outputs=gradio.JSON(label="accuracies and standard errors"),
    title="HellaSwag",
    description=metric.description,
).launch()
