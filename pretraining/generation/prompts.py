"""Prompts: where they come from, and how they fit into a model's positions."""

import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pretraining.cli import flag
from pretraining.errors import UserError

MAX_PROBLEMS = 10  # shown; in a file of another kind every line is wrong


@dataclass
class PromptFlags:
    _argument_group_name = "prompts; without one, a session at the terminal, or standard input as one prompt"

    prompt: list[str] = flag([], "beginnings of texts", nargs="+")
    prompt_file: str | None = flag(
        None, "a file with a prompt a line; if its name ends with .jsonl, each a JSON object with a `prompt`"
    )
    truncate: bool = flag(False, "let a prompt that is longer than the model's positions lose its beginning")

    def problems_of_prompts(self) -> list[str]:
        if self.prompt and self.prompt_file:
            return ["--prompt and --prompt_file are two sources: give one of them"]
        return []

    def read_prompts(self) -> list[str] | None:
        """
        Return the prompts, or None if a person at a terminal is to be asked for them.

        Raises:
            UserError: if the file or standard input cannot be read, or the file has no prompts; for lines without a
                prompt, a message each.
        """
        if self.prompt_file:
            return read_prompt_file(Path(self.prompt_file))
        if self.prompt:
            return self.prompt
        if sys.stdin is None:
            raise UserError("standard input is closed: give a --prompt or --prompt_file")
        if sys.stdin.isatty():
            return None
        try:
            return [sys.stdin.read().removesuffix("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"standard input is not a text: {error}") from None


def read_prompt_file(path: Path) -> list[str]:
    """Read prompts from a file. Raises: see `PromptFlags.read_prompts`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows may have put a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts, problems = [], []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    prompts.append(_prompt_of(line))
                except ValueError as error:
                    problems.append(f"--prompt_file {path} line {number}: {error}")
        if problems:
            raise UserError(*problems[:MAX_PROBLEMS])
    if not prompts:
        raise UserError(f"--prompt_file {path} has no prompts")
    return prompts


def _prompt_of(line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not a JSON object") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError("is not a JSON object with a text as its `prompt`")
    return record["prompt"]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, num_positions: int | None, max_new_tokens: int, truncate: bool
) -> tuple[list[int], str | None]:
    """
    Return a prompt's token ids, and a warning if it was cut. The ids are those of the text as it stands, as
    `pipeline("text-generation")` has them. An empty prompt becomes the token that begins a text, or ends one.

    Args:
        num_positions: of the model, None if they are not limited.
        truncate: cut the beginning off a prompt that leaves no room for a new token. That makes room for
            `max_new_tokens`, but keeps at least half of the positions for the prompt.

    Raises:
        UserError: if the prompt is too long, or no text.
    """
    if re.search("[\ud800-\udfff]", prompt):  # of a terminal in another encoding
        raise UserError(f"the prompt {textwrap.shorten(prompt, 40)!r} is not valid Unicode")
    token_ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not token_ids:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise UserError("an empty prompt needs a tokenizer with a token that begins or ends a text: give a prompt")
        token_ids = [first]
    if num_positions is None or len(token_ids) < num_positions:
        return token_ids, None
    name = f"the prompt {textwrap.shorten(prompt, 40)!r} has {len(token_ids):,} tokens"
    if not truncate:
        raise UserError(
            f"{name}, which leave no room in the model's {num_positions:,} positions: make it shorter, or "
            "give --truncate"
        )
    kept = num_positions - min(max_new_tokens, num_positions // 2)
    first = token_ids[:1] if token_ids[0] == tokenizer.bos_token_id else []  # which the model expects at the beginning
    return first + token_ids[len(first) - kept :], f"{name}: only the last {kept:,} are used"
