"""The settings of generation, and what they mean to transformers' `generate`."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

from pretraining.cli import flag, problems_of_range

# Defaults for a small model. It is worst at judging improbable tokens, which top_k and top_p leave out; a temperature
# below 1 makes the most probable ones a little more so.
SAMPLING: dict[str, float] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@dataclass
class GenerationFlags:
    _argument_group_name = "generation"

    max_new_tokens: int = flag(200, "tokens of a text, without its prompt")
    temperature: float | None = flag(
        None, "below 1, probable tokens become more probable; at 0, the most probable one is taken; 0.8 if left out"
    )
    top_k: int | None = flag(None, "draw from this many of the most probable tokens; 0 for all; 50 if left out")
    top_p: float | None = flag(
        None, "draw from the most probable tokens that have this probability together; 1 for all; 0.95 if left out"
    )
    repetition_penalty: float = flag(1.0, "above 1, tokens that are in the text already become less probable")
    num_beams: int = flag(
        1,
        "beam search with this many beams; it draws nothing at random unless one of the three flags above is given",
    )
    num_return_sequences: int = flag(1, "texts for each prompt")
    stop_strings: list[str] = flag([], "end a text after one of these", nargs="+")
    seed: int = flag(42, "seed of the random draws")

    def problems_of_generation(self) -> list[str]:
        found = problems_of_range(self, ["max_new_tokens", "num_beams", "num_return_sequences"], 1)
        found += problems_of_range(self, ["top_k", "seed"], 0)
        if self.seed >= 1 << 32:
            found.append(f"--seed must be below 2^32, got {self.seed}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            found.append(f"--temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            found.append(f"--repetition_penalty must be a finite number above 0, got {self.repetition_penalty}")
        if "" in self.stop_strings:
            found.append("--stop_strings has an empty one, which every text ends with")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            found.append(
                f"--num_return_sequences {self.num_return_sequences} needs as many beams: "
                f"--num_beams {self.num_beams} ends with {self.num_beams} texts"
            )
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.draws():
            found.append(
                f"--num_return_sequences {self.num_return_sequences} with --temperature 0 would be "
                "the same text each time: give a --temperature above 0, or --num_beams"
            )
        return found

    def draws(self) -> bool:
        """Return True if tokens are drawn at random."""
        is_told = any(getattr(self, name) is not None for name in SAMPLING)
        return self.temperature != 0 and (self.num_beams == 1 or is_told)

    def config(self, max_new_tokens: int, eos_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """
        Return the settings as `generate` takes them.

        Args:
            max_new_tokens: of this text, which may have less room than the flags ask for.
            eos_token_ids: the tokens that end a text.
        """
        settings: dict[str, Any] = {"do_sample": self.draws(), "max_new_tokens": max_new_tokens}
        if self.draws():
            given = asdict(self)
            settings |= {name: SAMPLING[name] if given[name] is None else given[name] for name in SAMPLING}
        return GenerationConfig(
            **settings,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
            stop_strings=self.stop_strings or None,
            eos_token_id=eos_token_ids or None,
            pad_token_id=pad_token_id,
        )
