"""
Greedy generation from GPT-2, by this model and by transformers' own, with the same weights and prompts, in turns.

    python benchmarks/generation.py

The weights are random, which changes no speed. Fails if a single token differs.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import side_by_side
from modeling_gpt2scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from pretraining import hardware
from pretraining.arguments import flag, parse_arguments, run_script


@dataclass
class BenchmarkArguments:
    config_name: str = flag("124M", "the model: 124M, 350M, 774M or 1558M")
    batch_sizes: list[int] = flag([1, 8], "prompts at once", nargs="+")
    prompt_tokens: int = flag(32, "tokens of a prompt")
    max_new_tokens: int = flag(200, "tokens to generate")
    rounds: int = flag(5, "times that each is measured")


def models(config_name: str) -> dict[str, PreTrainedModel]:
    ours = GPT2ScratchForCausalLM(GPT2ScratchConfig.from_preset(config_name))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, save_original_format=True)
        stock = GPT2LMHeadModel.from_pretrained(folder)
    return {"ours": ours.to(side_by_side.device()).eval(), "stock": stock.to(side_by_side.device()).eval()}


def main() -> None:
    args = parse_arguments(BenchmarkArguments, __doc__)
    if not torch.cuda.is_available():
        hardware.keep_freed_memory()
    torch.manual_seed(0)
    contenders = models(args.config_name)
    rows = []
    for batch_size in args.batch_sizes:
        vocab_size = contenders["ours"].config.vocab_size
        prompts = torch.randint(vocab_size, (batch_size, args.prompt_tokens), device=side_by_side.device())
        kept = {name: [] for name in contenders}
        times = {name: [] for name in contenders}

        def generate(name: str) -> None:
            options = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens, "pad_token_id": 0}
            kept[name].append(contenders[name].generate(prompts, do_sample=False, **options))  # noqa: B023

        for number in range(args.rounds + 1):
            for name in contenders:
                taken = side_by_side.seconds(lambda: generate(name))  # noqa: B023
                if number:  # the first one warms up
                    times[name].append(taken)
        same = all(torch.equal(one, two) for one, two in zip(kept["ours"], kept["stock"], strict=True))
        if not same:
            raise RuntimeError(f"the models do not generate the same tokens, with {batch_size} prompts at once")
        tokens = batch_size * args.max_new_tokens
        rates = [f"{tokens / statistics.median(times[name]):.1f}" for name in contenders]
        ratio = statistics.median(two / one for one, two in zip(times["ours"], times["stock"], strict=True))
        rows.append([batch_size, *rates, f"{ratio:.2f}"])
    header = ["prompts at once", "ours, tokens/s", "stock, tokens/s", "ours is so many times as fast"]
    lines = [
        side_by_side.here("torch", "transformers"),
        "",
        f"{args.config_name}, {args.max_new_tokens} new tokens after {args.prompt_tokens}, fp32, greedy, medians of "
        f"{args.rounds} rounds; all tokens are the same:",
        "",
        *side_by_side.table(header, rows),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
