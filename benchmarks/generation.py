"""
Greedy generation from GPT-2, by this model and by transformers' own, with the same weights and prompts, in turns.

    python benchmarks/generation.py
    python benchmarks/generation.py --mixed_precision bf16

The weights are random, which changes no speed. In fp32, the default, it fails if a single token differs. bf16 and fp16
are the dtype of the weights, as people load a model to generate with; there, rounding decides between close tokens.
"""

import json
import sys
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.cli import flag, parse_arguments, run_script
from pretraining.markdown import table

OURS, STOCK = "ours", "stock"


@dataclass
class BenchmarkArguments:
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    batch_sizes: list[int] = flag([1, 8], "prompts at once", nargs="+")
    mixed_precision: side_by_side.MixedPrecision = flag("no", "the precision")
    prompt_tokens: int = flag(32, "tokens of a prompt")
    max_new_tokens: int = flag(200, "tokens to generate")
    rounds: int = flag(5, "times that each is measured")
    measure: str = flag(None, "measure this one, in this process")


def build(name: str, config: GPT2ScratchConfig, mixed_precision: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = GPT2ScratchForCausalLM(config)
    if name == STOCK:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_original_format=True)
            model = GPT2LMHeadModel.from_pretrained(folder)
    return model.to(side_by_side.device(), side_by_side.DTYPES[mixed_precision]).eval()


def measure(args: BenchmarkArguments) -> dict[str, float]:
    if side_by_side.device().type == "cpu":
        hardware.keep_freed_memory()
    model = build(args.measure, GPT2ScratchConfig.from_preset(args.config_name), args.mixed_precision)
    (batch_size,) = args.batch_sizes
    return speed(model, batch_size, args.prompt_tokens, args.max_new_tokens)


def speed(model: PreTrainedModel, batch_size: int, prompt_tokens: int, max_new_tokens: int) -> dict[str, float]:
    """Generate once to warm up, and once more on the clock."""
    torch.manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens)).to(model.device)

    def generate(new_tokens: int) -> torch.Tensor:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, "do_sample": False}
        return model.generate(prompts, **options)  # type: ignore[operator]

    generate(8)
    side_by_side.forget_peak_memory()
    texts: list[torch.Tensor] = []
    seconds = side_by_side.seconds(lambda: texts.append(generate(max_new_tokens)))
    checksum = zlib.crc32(texts[0].cpu().numpy().tobytes())
    rate = batch_size * max_new_tokens / seconds
    return {"tokens/s": rate, "megabytes": side_by_side.memory(peak=True), "tokens' checksum": checksum}


def is_same_text(measured: side_by_side.Measured) -> bool:
    return len({each["tokens' checksum"] for results in measured.values() for each in results}) == 1


def row(args: BenchmarkArguments, batch_size: int) -> list[object]:
    names = "config_name mixed_precision prompt_tokens max_new_tokens".split()
    flags = [word for name in names for word in (f"--{name}", asdict(args)[name])]
    measured = side_by_side.in_turns(__file__, (OURS, STOCK), args.rounds, *flags, "--batch_sizes", batch_size)
    if args.mixed_precision == "no" and not is_same_text(measured):
        raise RuntimeError(f"the models do not generate the same tokens, with {batch_size} prompts at once")
    return row_of(measured, batch_size)


def row_of(measured: side_by_side.Measured, batch_size: int) -> list[object]:
    figures = side_by_side.medians(measured, {"tokens/s": ".1f", "megabytes": ",.0f"})
    (_, *ours), (_, *stock) = figures
    return [batch_size, *ours, *stock, f"{side_by_side.ratio(measured, OURS, STOCK, 'tokens/s'):.2f}"]


HEADER = [
    "prompts at once",
    "ours, tokens/s",
    "peak MB",
    "stock, tokens/s",
    "peak MB",
    "ours is so many times as fast",
]


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    rows = [row(args, batch_size) for batch_size in args.batch_sizes]
    print(
        side_by_side.section(
            ("torch", "transformers"),
            f"{args.config_name}, {args.max_new_tokens} new tokens after {args.prompt_tokens}, "
            f"{side_by_side.precision_name(args.mixed_precision)}, greedy, medians of {args.rounds} rounds"
            + ("; all tokens are the same" if args.mixed_precision == "no" else ""),
            table(HEADER, rows),
        )
    )


if __name__ == "__main__":
    run_script(main)
