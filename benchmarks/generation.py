"""
Greedy generation from GPT-2, by this model and by transformers' own, with the same weights and prompts, in turns.

    python benchmarks/generation.py

The weights are random, which changes no speed. Fails if a single token differs.
"""

import json
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.arguments import flag, parse_arguments, run_script
from pretraining.markdown import table

OURS, STOCK = "ours", "stock"


@dataclass
class BenchmarkArguments:
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    batch_sizes: list[int] = flag([1, 8], "prompts at once", nargs="+")
    prompt_tokens: int = flag(32, "tokens of a prompt")
    max_new_tokens: int = flag(200, "tokens to generate")
    rounds: int = flag(5, "times that each is measured")
    measure: str = flag(None, "measure this one, in this process")


def build(name: str, config_name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(config_name))
    if name == STOCK:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_original_format=True)
            model = GPT2LMHeadModel.from_pretrained(folder)
    return model.to(side_by_side.device()).eval()


def measure(args: BenchmarkArguments) -> dict[str, float]:
    if not torch.cuda.is_available():
        hardware.keep_freed_memory()
    model = build(args.measure, args.config_name)
    (batch_size,) = args.batch_sizes
    torch.manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (batch_size, args.prompt_tokens)).to(model.device)
    options = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens, "pad_token_id": 0}
    model.generate(prompts, **{**options, "max_new_tokens": 8, "min_new_tokens": 8}, do_sample=False)  # warms up
    side_by_side.forget_peak_memory()
    texts = []
    seconds = side_by_side.seconds(lambda: texts.append(model.generate(prompts, **options, do_sample=False)))
    checksum = zlib.crc32(texts[0].cpu().numpy().tobytes())
    rate = batch_size * args.max_new_tokens / seconds
    return {"tokens/s": rate, "megabytes": side_by_side.memory(peak=True), "tokens' checksum": checksum}


def row(args: BenchmarkArguments, batch_size: int) -> list[object]:
    flags = ["--config_name", args.config_name, "--batch_sizes", batch_size, "--prompt_tokens", args.prompt_tokens]
    flags += ["--max_new_tokens", args.max_new_tokens]
    measured = side_by_side.in_turns(__file__, (OURS, STOCK), args.rounds, *flags)
    if len({each["tokens' checksum"] for results in measured.values() for each in results}) > 1:
        raise RuntimeError(f"the models do not generate the same tokens, with {batch_size} prompts at once")
    figures = side_by_side.medians(measured, {"tokens/s": ".1f", "megabytes": ",.0f"})
    (_, *ours), (_, *stock) = figures
    return [batch_size, *ours, *stock, f"{side_by_side.ratio(measured, OURS, STOCK, 'tokens/s'):.2f}"]


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    rows = [row(args, batch_size) for batch_size in args.batch_sizes]
    header = ["prompts at once", "ours, tokens/s", "peak MB", "stock, tokens/s", "peak MB"]
    print(
        side_by_side.section(
            ("torch", "transformers"),
            f"{args.config_name}, {args.max_new_tokens} new tokens after {args.prompt_tokens}, fp32, greedy, medians "
            f"of {args.rounds} rounds; all tokens are the same",
            table([*header, "ours is so many times as fast"], rows),
        )
    )


if __name__ == "__main__":
    run_script(main)
