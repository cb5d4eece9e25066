"""A session at the terminal: a prompt, the text that follows it, and the next prompt."""

import contextlib
import dataclasses
import sys
from typing import Any

import torch

from pretraining.errors import UserError, nearest
from pretraining.generation.flags import SAMPLING, GenerationFlags
from pretraining.generation.writer import TextWriter

HELP = """\
Type the beginning of a text; an empty line lets the model begin by itself. Ctrl-C stops a text, arrow keys bring
earlier prompts back. A line that begins with / is a command:
  /set temperature 0.5     change a setting; none takes a sampling setting back to its default
  /show                    show all settings
  /help                    show this
  /quit                    end, as Ctrl-D does"""


class Session:
    """Reads prompts and commands until the person ends it."""

    def __init__(self, writer: TextWriter, settings: GenerationFlags):
        self.writer = writer
        self.settings = settings

    def run(self) -> None:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives `input` a history and editing
        print("Type the beginning of a text. /help tells more, Ctrl-D ends.")
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # drops the line, as a shell does
                print()
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._command(line) if line.startswith("/") else self._write(line)
            except UserError as error:
                print("\n".join(error.problems), file=sys.stderr)

    def _write(self, prompt: str) -> None:
        (encoded,), messages = self.writer.encode([prompt], self.settings)
        for message in messages:
            print(message, file=sys.stderr)
        try:
            if self.settings.num_beams == 1 and self.settings.num_return_sequences == 1:
                texts = [self.writer.stream(encoded, self.settings)]
            else:
                (texts,) = self.writer.write([encoded], self.settings)
                print("\n---\n".join(text.prompt + text.generated_text for text in texts))
        except KeyboardInterrupt:
            print("\n[stopped]")
            return
        if texts[0].finish_reason == "last_position":
            print(f"[the model's {self.writer.num_positions:,} positions are full]", file=sys.stderr)

    def _command(self, line: str) -> None:
        match line.split(maxsplit=2):
            case ["/help"]:
                print(HELP)
            case ["/show"]:
                for name, value in dataclasses.asdict(self.settings).items():
                    print(f"  {name} {value}")
            case ["/set", name, value]:
                self.settings = changed(self.settings, name, value)
                if name == "seed":
                    torch.manual_seed(self.settings.seed)
            case ["/set", *_]:
                raise UserError("a setting has a name and a value: /set temperature 0.5")
            case [command, *_]:
                raise UserError(f"there is no {command}: /help shows what there is")


def changed(settings: GenerationFlags, name: str, text: str) -> GenerationFlags:
    """
    Return the settings with another value for one of them.

    Raises:
        UserError: for an unknown name, or a value that does not go.
    """
    name, values = name.removeprefix("--"), dataclasses.asdict(settings)
    if name not in values:
        raise UserError(f"there is no setting '{name}'{nearest(name, list(values))}: /show shows them all")
    if text == "none" and name in (*SAMPLING, "stop_strings"):
        value: Any = [] if name == "stop_strings" else None
    elif name == "stop_strings":
        value = [text]
    else:
        is_whole = name not in ("temperature", "top_p", "repetition_penalty")
        try:
            value = int(text) if is_whole else float(text)
        except ValueError:
            raise UserError(f"{name} must be a {'whole ' if is_whole else ''}number, got '{text}'") from None
    new = dataclasses.replace(settings, **{name: value})
    if problems := new.problems_of_generation():
        raise UserError(*(problem.replace("--", "") for problem in problems))
    return new
