"""
Publish a trained model on the Hub, or write it in the format of other programs, or both.

    python publish_model.py --model_name_or_path runs/demo --push_to_hub --hub_model_id USER/NAME
    python publish_model.py --model_name_or_path runs/demo --format gpt2 --output_dir exported/demo-gpt2
    python publish_model.py --model_name_or_path runs/demo --format gguf --outtype q8_0 \\
        --output_dir exported/demo-gguf --push_to_hub --hub_model_id USER/NAME-GGUF

As it is, a run's model has its code beside the weights, and loads with trust_remote_code. The formats:

gpt2  a stock GPT2LMHeadModel, which loads without: in transformers, vLLM, TGI and other programs that know GPT-2
gguf  model.gguf, for llama.cpp and what is built on it
onnx  onnx/model.onnx, for ONNX Runtime and transformers.js
"""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2scratch import GPT2ScratchForCausalLM
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.errors import UserError, one_line
from pretraining.files import folder_in_progress
from pretraining.hub import HubFlags, create_repository
from pretraining.publishing.card_edits import converted_card
from pretraining.publishing.formats import STOCK, write_gguf, write_onnx, write_stock
from pretraining.publishing.model_card import CARD, title_of
from pretraining.publishing.push import published, push, read_card
from pretraining.publishing.usage import ConvertedFormat
from pretraining.records.run_files import PLOTS, TRAINING_ARGS
from pretraining.training.model import load_model_and_tokenizer

PACKAGES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript")}  # of the extras of these names
# What a converted model's folder may hold, whole or not.
CONVERTED = f"""config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
    vocab.json merges.txt special_tokens_map.json added_tokens.json chat_template.jinja
    model.gguf onnx {PLOTS} {CARD} {STOCK}""".split()


@dataclass
class FormatFlags:
    _argument_group_name = "model, and the format to write it in"

    model_name_or_path: str = flag(None, "the run folder, or another folder with a model (required)")
    format: ConvertedFormat | None = flag(None, "write it in this format; as it is if left out")
    output_dir: str | None = flag(None, "with --format: where to write it")
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = flag("f32", "with --format gguf: the type of the matrices")


@dataclass
class PublishArguments(HubFlags, FormatFlags):
    """All flags, those of the last class first."""

    def problems(self) -> list[str]:
        found = problems_of_model(self.model_name_or_path, self.format)
        if self.output_dir and not self.format:
            found.append(f"--output_dir {self.output_dir} is for a --format: gpt2, gguf or onnx")
        elif self.format and not self.output_dir:
            found.append(f"--format {self.format} needs an --output_dir to write to")
        elif self.output_dir and Path(self.output_dir).exists():
            found.append(
                f"--output_dir {self.output_dir} exists: choose another or delete it (or publish what is there, as "
                "--model_name_or_path)"
            )
        elif not self.format and not self.push_to_hub:
            found.append("nothing to do: give --push_to_hub, or a --format and an --output_dir")
        if self.outtype != "f32" and self.format != "gguf":
            found.append(f"--outtype {self.outtype} is for --format gguf")
        found += self.problems_of_hub()
        missing = [name for name in PACKAGES.get(self.format or "", ()) if find_spec(name) is None]
        if missing:
            found.append(f"--format {self.format}: a package is not installed, pip install {' '.join(missing)}")
        return found


def problems_of_model(folder: str | None, format: str | None) -> list[str]:
    if not folder:
        return ["--model_name_or_path is required: a run folder"]
    if not Path(folder).is_dir():
        return [f"--model_name_or_path {folder} is not a folder"]
    try:
        files = {path.name for path in published(Path(folder))}
    except UserError as error:
        return list(error.problems)
    if files & {"model.gguf", "model.onnx"}:
        return (
            [f"--model_name_or_path {folder} was converted already: --format wants the run folder"] if format else []
        )
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        is_run = (Path(folder) / TRAINING_ARGS).is_file()
        why = "the run goes on when its command is given again" if is_run else "config.json and model.safetensors"
        return [f"--model_name_or_path {folder} holds no finished model: {why}"]
    if not files & {"tokenizer.json", "vocab.json"}:
        return [f"--model_name_or_path {folder} has no tokenizer.json: copy the files of its tokenizer into it"]
    return []


def main() -> None:
    args = parse_arguments(PublishArguments, __doc__)
    disable_progress_bar()  # transformers' own
    folder = Path(args.model_name_or_path)
    output_dir = Path(args.output_dir) if args.output_dir else folder
    repo_id = args.hub_model_id or title_of(args.output_dir or args.model_name_or_path)
    if args.format:
        if args.push_to_hub:  # what the Hub refuses, it had better refuse now
            create_repository(repo_id, args.hub_private_repo, args.license)
        convert(args, args.format, folder, output_dir)
        print(f"written as {output_dir}")
    if args.push_to_hub:
        message = f"Published by gpt2scratch{f' as {args.format}' if args.format else ''}"
        address = push(output_dir, repo_id, args.hub_private_repo, message, args.license, args.stock_branch)
        print(f"published as {address}")


def convert(args: PublishArguments, format: ConvertedFormat, folder: Path, output_dir: Path) -> None:
    """
    Write the model in another format, with tokenizer, card and plots.

    Raises:
        UserError: if that cannot be done. There is no half of it then.
    """
    model, tokenizer = load_model_and_tokenizer(GPT2ScratchForCausalLM, str(folder))
    card = converted_card(read_card(folder), output_dir, format, model.config, args.outtype, args.license)
    try:
        with folder_in_progress(output_dir, set(CONVERTED)) as part:
            if format == "gpt2":
                write_stock(model, tokenizer, part)
            elif format == "onnx":
                write_onnx(model, tokenizer, part)
            else:
                write_gguf(model, tokenizer, part, args.outtype)
            card.save(part / CARD)
            for plot in published(folder):
                if plot.suffix == ".png":
                    (part / PLOTS).mkdir(exist_ok=True)
                    shutil.copyfile(plot, part / PLOTS / plot.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {one_line(error)}") from error


if __name__ == "__main__":
    run_script(main)
