"""
Let a model write: texts from prompts, or a session at the terminal.

    python generate.py --model_name_or_path runs/demo
    python generate.py --model_name_or_path runs/demo --prompt "def __init__(self" "class Test" --temperature 0.5
    python generate.py --model_name_or_path openai-community/gpt2 --prompt_file prompts.txt --output_file texts.jsonl

The texts are those of transformers' `generate`. Without a prompt at a terminal, a session begins, in which Ctrl-C
stops a text; what is piped in is one prompt.
"""

from pretraining.quick_imports import finish_imports  # isort: skip  before transformers

import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from pretraining.cli import flag, parse_arguments, problems_of_range, run_script
from pretraining.distributed.launcher import told_precision
from pretraining.distributed.processes import open_state
from pretraining.errors import UserError
from pretraining.files import unwritable, write_text
from pretraining.generation.flags import GenerationFlags
from pretraining.generation.prompts import PromptFlags
from pretraining.generation.session import Session
from pretraining.generation.writer import Encoded, Text, TextWriter
from pretraining.model_flags import LoadedModelFlags
from pretraining.precision import choose_precision
from pretraining.training.model import load_from_flags

finish_imports()

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class OutputFlags:
    _argument_group_name = "output"

    per_device_eval_batch_size: int = flag(8, "prompts at once")
    output_file: str | None = flag(
        None, "a JSON-lines file for the texts: `prompt generated_text num_new_tokens finish_reason`"
    )


@dataclass
class GenerateArguments(OutputFlags, GenerationFlags, PromptFlags, LoadedModelFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = self.problems_of_model() + self.problems_of_prompts() + self.problems_of_generation()
        found += problems_of_range(self, ["per_device_eval_batch_size"], 1)
        if self.output_file and (problem := unwritable(Path(self.output_file))):
            found.append(f"--output_file {self.output_file} {problem}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            found.append("generate.py is one process: start it with python, or accelerate launch --num_processes 1")
        return found


def main() -> None:
    args = parse_arguments(GenerateArguments, __doc__)
    prompts = args.read_prompts()
    if prompts is None and args.output_file:
        raise UserError("--output_file is for texts of a --prompt or --prompt_file: give one")
    logging.disable_progress_bar()
    writer = open_writer(args)
    torch.manual_seed(args.seed)
    if prompts is None:
        Session(
            writer, GenerationFlags(**{each.name: getattr(args, each.name) for each in fields(GenerationFlags)})
        ).run()
    else:
        write_texts(args, writer, prompts)


def open_writer(args: GenerateArguments) -> TextWriter:
    """Load the model onto the best device, in the precision that training chooses there, but for a CPU in fp32."""
    state = open_state()
    told = told_precision()
    # A CPU reads all weights for each token, and computes little: bf16 gains nothing, and costs a small model a third
    # of its speed (docs/experiments.md).
    precision = choose_precision(state.device, "no" if told is None and state.device.type == "cpu" else told)
    if precision.mixed_precision not in DTYPES:
        raise UserError(
            f"texts cannot be written in {precision.mixed_precision}: ask for no (which is fp32), fp16 or bf16"
        )
    if precision.warning and precision.mixed_precision != "no":  # what it says of fp32 is true of training
        print(f"warning: {precision.warning}", file=sys.stderr)
    # Loaded in that type, not cast to it: the frequencies of rotary positions stay in fp32 then.
    model, tokenizer = load_from_flags(args, dtype=DTYPES[precision.mixed_precision])
    model.to(state.device)
    return TextWriter(model, tokenizer, args.truncate)


def write_texts(args: GenerateArguments, writer: TextWriter, prompts: list[str]) -> None:
    """Write a text for each prompt, to standard output or the file."""
    encoded, messages = writer.encode(prompts, args)
    for message in messages:
        print(message, file=sys.stderr)
    is_streamed = len(prompts) == args.num_return_sequences == args.num_beams == 1 and not args.output_file
    texts: dict[int, list[Text]] = {}
    failure = None
    try:
        if is_streamed:
            texts[0] = [writer.stream(encoded[0], args)]
        else:
            write_batches(args, writer, encoded, texts)
    except (KeyboardInterrupt, Exception) as error:  # what is written so far is kept
        failure = error
    in_order = [text for index in sorted(texts) for text in texts[index]]
    if args.output_file and (texts or not failure):
        try:
            write_text(Path(args.output_file), "".join(json.dumps(asdict(text)) + "\n" for text in in_order))
        except OSError as error:
            raise UserError(f"--output_file {args.output_file} cannot be written: {error.strerror}") from error
        print(f"{args.output_file}: texts of {len(texts):,} of {len(prompts):,} prompts", file=sys.stderr)
    elif in_order and not is_streamed:
        print("\n---\n".join(text.prompt + text.generated_text for text in in_order))
    full = sum(text.finish_reason == "last_position" for text in in_order)
    if full:
        print(
            f"{full:,} of {len(in_order):,} texts end where the model's {writer.num_positions:,} positions are full",
            file=sys.stderr,
        )
    if failure:
        raise failure


def write_batches(
    args: GenerateArguments, writer: TextWriter, encoded: list[Encoded], texts: dict[int, list[Text]]
) -> None:
    """Write texts batch by batch, and put those of each prompt under its index."""
    batches = writer.batches(encoded, args.per_device_eval_batch_size)
    with tqdm(total=len(encoded), desc="prompts", disable=len(batches) == 1) as bar:
        for batch in batches:
            for each, of_prompt in zip(batch, writer.write(batch, args), strict=True):
                texts[each.index] = of_prompt
            bar.update(len(batch))


if __name__ == "__main__":
    run_script(main)
