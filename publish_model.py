"""
Publish a trained model on the Hub, or write it in the format of other programs, or both.

    python publish_model.py --model_name_or_path runs/demo --push_to_hub --hub_model_id USER/NAME
    python publish_model.py --model_name_or_path runs/demo --format gpt2 --output_dir exported/demo-gpt2
    python publish_model.py --model_name_or_path runs/demo --format gguf --outtype q8_0 \\
        --output_dir exported/demo-gguf --push_to_hub --hub_model_id USER/NAME-GGUF

gpt2scratch  the folder as it is, its code beside the weights: loads with trust_remote_code
gpt2         a stock GPT2LMHeadModel: loads without, also in vLLM, TGI and other programs that know GPT-2
gguf         model.gguf: llama.cpp, and what is built on it
onnx         onnx/model.onnx: ONNX Runtime, transformers.js
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2scratch import GPT2ScratchForCausalLM
from pretraining import publish
from pretraining.arguments import UserError, flag, one_line, parse_arguments, run_script
from pretraining.files import folder_in_progress
from pretraining.model_card import CARD, Format, converted_card, problems_of_license

PACKAGES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript")}  # of the extras of these names
# What a converted model's folder may hold.
CONVERTED = """config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json vocab.json
    merges.txt special_tokens_map.json added_tokens.json chat_template.jinja model.gguf onnx plots README.md""".split()


@dataclass
class PublishArguments:
    model_name_or_path: str = flag(None, "the run folder, or another folder with a model that was saved")
    format: Literal[get_args(Format)] = flag("gpt2scratch", "of what is published or written")
    output_dir: str = flag(None, "where to write the model in another format than its own")
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = flag("f32", "with --format gguf: the type of the matrices")
    push_to_hub: bool = flag(False, "publish it on the Hub")
    hub_model_id: str = flag(None, "under this name; that of the folder if left out")
    hub_private_repo: bool = flag(False, "make the repository a private one, if it is not there yet")
    license: str = flag(None, "of the weights, for the model card: as the Hub names it; as it says if left out")

    def problems(self) -> list[str]:
        found, folder = [], self.model_name_or_path
        if not folder:
            found.append("--model_name_or_path is required: a run folder")
        elif not (Path(folder) / "config.json").is_file() or not list(Path(folder).glob("model*.safetensors")):
            is_run = (Path(folder) / "training_args.yaml").is_file()
            found.append(
                f"--model_name_or_path {folder} holds no finished model"
                + (
                    ": the run goes on when its command is given again"
                    if is_run
                    else " (config.json, model.safetensors)"
                )
            )
        elif not list(Path(folder).glob("tokenizer*.json")):
            found.append(f"--model_name_or_path {folder} has no tokenizer (tokenizer.json)")
        if self.format == "gpt2scratch" and self.output_dir:
            found.append(f"--output_dir {self.output_dir} is for another --format: gpt2, gguf or onnx")
        if self.format == "gpt2scratch" and not self.push_to_hub:
            found.append("nothing to do: give --push_to_hub, or a --format to write and an --output_dir")
        if self.format != "gpt2scratch" and not self.output_dir:
            found.append(f"--format {self.format} needs an --output_dir to write to")
        if self.output_dir and Path(self.output_dir).exists():
            found.append(f"--output_dir {self.output_dir} exists: choose another, or delete it")
        if self.outtype != "f32" and self.format != "gguf":
            found.append(f"--outtype {self.outtype} is for --format gguf")
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                found.append(f"--{name} {getattr(self, name)} is for --push_to_hub: give both")
        missing = [name for name in PACKAGES.get(self.format, ()) if find_spec(name) is None]
        if missing:
            found.append(f"--format {self.format}: a package is not installed, pip install {' '.join(missing)}")
        return found + problems_of_license(self.license)


def main() -> None:
    args = parse_arguments(PublishArguments, __doc__)
    disable_progress_bar()  # transformers' own
    folder = Path(args.model_name_or_path)
    if args.output_dir:
        folder = convert(args, folder, Path(args.output_dir))
        print(f"written as {folder}")
    if args.push_to_hub:
        repo_id = args.hub_model_id or folder.resolve().name
        message = f"Published by gpt2scratch as {args.format}"
        print(f"published as {publish.push(folder, repo_id, args.hub_private_repo, message, args.license)}")


def convert(args: PublishArguments, folder: Path, output_dir: Path) -> Path:
    """Write the model in another format, with tokenizer, card and plots. There is no half of it if that fails."""
    from pretraining.convert import write_gguf, write_onnx, write_stock

    model, tokenizer = load(folder)
    card = converted_card(publish.read_card(folder), output_dir, args.format, model.config)
    with folder_in_progress(output_dir, set(CONVERTED)) as part:
        if args.format == "gpt2":
            write_stock(model, tokenizer, part)
        elif args.format == "onnx":
            write_onnx(model, tokenizer, part)
        else:
            write_gguf(model, tokenizer, part, args.outtype)
        card.save(part / CARD)
        for plot in folder.glob("plots/*.png"):
            (part / "plots").mkdir(exist_ok=True)
            (part / "plots" / plot.name).write_bytes(plot.read_bytes())
    return output_dir


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Model and tokenizer, by this repository's code.

    Raises:
        UserError: if they cannot be loaded, or are not of a GPT-2.
    """
    try:
        model, report = GPT2ScratchForCausalLM.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files, another kind of model: of several libraries
        raise UserError(f"--model_name_or_path {folder} cannot be loaded: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {folder} has no weights for {missing[0]} and others")
    return model.eval(), tokenizer


if __name__ == "__main__":
    run_script(main)
