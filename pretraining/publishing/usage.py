"""How a published model is used, in each format: the examples on its card, which work when they are pasted."""

import json
import shlex
from typing import Literal

from transformers import PreTrainedConfig

ConvertedFormat = Literal["gpt2", "gguf", "onnx"]
Format = Literal["gpt2scratch", ConvertedFormat]

STOCK_BRANCH = "gpt2"  # of a repository, with the stock form of its model
PIPELINE = """```python
from transformers import pipeline

generator = pipeline("text-generation", model={name}{revision}{trust})
print(generator({prompt}, max_new_tokens={new_tokens})[0]["generated_text"])
```"""
GGUF = """With transformers (`pip install transformers gguf`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

sizes = {{"n_positions": {n_positions}, "n_inner": {n_inner}}}  # which transformers does not read from the file
model = AutoModelForCausalLM.from_pretrained({name}, gguf_file="model.gguf", **sizes)
tokenizer = AutoTokenizer.from_pretrained({name}, gguf_file="model.gguf")
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator({prompt}, max_new_tokens={new_tokens})[0]["generated_text"])
```

llama.cpp, and what is built on it, takes the file `model.gguf` as it is:

```bash
llama-completion -m model.gguf -p {shell_prompt} -n {new_tokens}
```"""
ONNX = """With ONNX Runtime (`pip install transformers onnxruntime`):

```python
from pathlib import Path

import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

name = {name}
folder = name if Path(name).is_dir() else snapshot_download(name)
config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/onnx/model.onnx")
names = [each.name for each in session.get_inputs() if each.name.startswith("past_key_values")]
nothing = np.zeros((1, config.n_head, 0, config.n_embd // config.n_head), np.float32)
past, text = dict.fromkeys(names, nothing), tokenizer({prompt})["input_ids"]
new, longest = text, len(text) + {new_tokens}
while len(text) < longest:
    inputs = {{
        "input_ids": np.array([new], np.int64),
        "attention_mask": np.ones((1, len(text)), np.int64),
        "position_ids": np.arange(len(text))[None, -len(new) :],
    }}
    logits, *present = session.run(None, inputs | past)
    new = [int(logits[0, -1].argmax())]  # greedy
    past, text = dict(zip(names, present)), text + new
print(tokenizer.decode(text))
```

Files, inputs and outputs are named as transformers.js and optimum name them. What was read before comes out as
`present.N.key` and `present.N.value`, (batch, heads, tokens, width of a head), and goes in as `past_key_values.N.key`
and `past_key_values.N.value`."""
REMOTE_CODE = """`trust_remote_code` runs the modeling code of this repository: read it first, and pin what you have
read by `revision="..."`, a commit of this repository, of its code and its weights alike."""
USAGE: dict[Format, str] = {
    "gpt2scratch": PIPELINE.replace("{trust}", ", trust_remote_code=True") + "\n\n" + REMOTE_CODE,
    "gpt2": PIPELINE.replace("{trust}", ""),
    "gguf": GGUF,
    "onnx": ONNX,
}


def usage(format: Format, name: str, prompt: str, config: PreTrainedConfig, revision: str | None = None) -> str:
    """
    Return an example that works when it is pasted.

    Args:
        prompt: of at most half as many bytes, and so tokens, as the model has positions.
        revision: of the repository, `main` if left out.
    """
    return USAGE[format].format(
        name=quoted(name),
        revision=f", revision={quoted(revision)}" if revision else "",
        prompt=quoted(prompt),
        shell_prompt=shlex.quote(prompt),
        new_tokens=min(60, config.n_positions // 2),
        n_positions=config.n_positions,
        n_inner=config.n_inner,
    )


def example_prompt(prompts: list[str], config: PreTrainedConfig) -> str:
    """The first that leaves room for an answer, and that every reader of a format can begin with."""
    fitting = (prompt for prompt in prompts if 0 < len(prompt.encode()) <= config.n_positions // 2)
    return next(fitting, "The")


def quoted(text: str) -> str:
    """As a string in JSON, which Python reads as well."""
    return json.dumps(text, ensure_ascii=False)
