"""Texts by transformers' `generate`: streamed as they are written, or many prompts at once."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pretraining.errors import UserError
from pretraining.generation.flags import GenerationFlags
from pretraining.generation.prompts import MAX_PROBLEMS, encode_prompt

FinishReason = Literal["end_of_text", "stop_string", "max_new_tokens", "last_position"]


@dataclass(frozen=True)
class Text:
    """
    Attributes:
        prompt: as it was given.
        generated_text: what follows it.
        num_new_tokens: of what follows, an end-of-text token included.
        finish_reason: why it ends: the model ended it, a stop string, `max_new_tokens`, or the model's last position.
    """

    prompt: str
    generated_text: str
    num_new_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Encoded:
    """
    Attributes:
        index: among all prompts.
        room: how many tokens may follow.
    """

    index: int
    prompt: str
    token_ids: list[int]
    room: int


class TextWriter:
    """
    Writes texts with a model.

    Args:
        model: in eval mode, on its device.
        truncate: see `encode_prompt`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, truncate: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.truncate = truncate
        self.num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.eos_token_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.vocab_size = model.config.get_text_config().vocab_size
        # Padding is masked, so that any token of the model does.
        pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        self.pad_token_id = next(each for each in pads if each is not None and each < self.vocab_size)

    def encode(self, prompts: list[str], settings: GenerationFlags) -> tuple[list[Encoded], list[str]]:
        """
        Return the prompts in tokens, and a warning for each that was cut.

        Raises:
            UserError: for each prompt that is too long, or has tokens that the model does not have.
        """
        encoded: list[Encoded] = []
        messages: list[str] = []
        problems: list[str] = []
        for index, prompt in enumerate(prompts):
            try:
                token_ids, message = encode_prompt(
                    self.tokenizer, prompt, self.num_positions, settings.max_new_tokens, self.truncate
                )
            except UserError as error:
                problems += error.problems
                continue
            if (largest := max(token_ids)) >= self.vocab_size:
                problems.append(f"the tokenizer gave token {largest:,}, but the model has only {self.vocab_size:,}")
                continue
            room = settings.max_new_tokens
            if self.num_positions is not None:
                room = min(room, self.num_positions - len(token_ids))
            encoded.append(Encoded(index, prompt, token_ids, room))
            messages += [message] if message else []
        if problems:
            more = [f"{len(problems) - MAX_PROBLEMS:,} more prompts cannot be used"] * (len(problems) > MAX_PROBLEMS)
            raise UserError(*problems[:MAX_PROBLEMS], *more)
        return encoded, messages

    def stream(self, encoded: Encoded, settings: GenerationFlags) -> Text:
        """Write one text, and print it word by word, its prompt first."""
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True)
        ((text,),) = self.write([encoded], settings, streamer=streamer)
        return text

    def batches(self, encoded: list[Encoded], batch_size: int) -> list[list[Encoded]]:
        """Return the prompts in batches. Those of a batch have equal room, so that all of them end at once."""
        by_room: dict[int, list[Encoded]] = {}
        for each in encoded:
            by_room.setdefault(each.room, []).append(each)
        return [
            group[start : start + batch_size]
            for group in by_room.values()
            for start in range(0, len(group), batch_size)
        ]

    def write(self, batch: list[Encoded], settings: GenerationFlags, **options: Any) -> list[list[Text]]:
        """
        Write texts for prompts with equal room.

        Args:
            options: more arguments of `generate`.

        Returns:
            `num_return_sequences` texts for each prompt.
        """
        longest = max(len(each.token_ids) for each in batch)
        padding = [longest - len(each.token_ids) for each in batch]
        rows = [[self.pad_token_id] * left + each.token_ids for left, each in zip(padding, batch, strict=True)]
        mask = [[0] * left + [1] * (longest - left) for left in padding]
        device = self.model.device
        output = self.model.generate(  # type: ignore[operator]
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings.config(batch[0].room, self.eos_token_ids, self.pad_token_id),
            tokenizer=self.tokenizer,
            **options,
        )
        new_token_ids = iter(output[:, longest:].tolist())
        return [
            [self._text(each, next(new_token_ids), settings) for _ in range(settings.num_return_sequences)]
            for each in batch
        ]

    def _text(self, encoded: Encoded, new_token_ids: list[int], settings: GenerationFlags) -> Text:
        """Cut off the padding of a batch, and say why the text ends."""
        new_token_ids = list(
            itertools.takewhile(lambda each: each >= 0, new_token_ids)
        )  # -1 pads without an end token
        end = next((place for place, each in enumerate(new_token_ids) if each in self.eos_token_ids), None)
        kept = new_token_ids if end is None else new_token_ids[:end]
        while settings.stop_strings and end is None and kept and kept[-1] == self.pad_token_id:
            kept = kept[:-1]
        text = self._decode(encoded.token_ids + kept)[len(self._decode(encoded.token_ids)) :]
        whole = self._decode(encoded.token_ids + kept, skip_special_tokens=False)  # a stop string may be one of them
        start = len(self._decode(encoded.token_ids, skip_special_tokens=False))
        reason: FinishReason = "max_new_tokens" if encoded.room == settings.max_new_tokens else "last_position"
        if any(stop in whole[max(0, start - len(stop) + 1) :] for stop in settings.stop_strings):
            reason = "stop_string"  # which may begin in the prompt
        elif end is not None:
            reason = "end_of_text"
        return Text(encoded.prompt, text, len(kept) + (reason == "end_of_text"), reason)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
