"""Errors that a user can fix, and the wording of messages."""

import difflib
import textwrap

# What people type who know other scripts.
SYNONYMS = {
    "num_train_epochs": "max_steps",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "output": "output_dir",
}


LONGEST = 1200  # characters of a message


class UserError(ValueError):
    """
    Something that the person at the command line can put right. `run_script` prints its message, one line a problem,
    without a traceback.
    """

    def __init__(self, *problems: str):
        self.problems = tuple(map(printable, problems))
        super().__init__("\n".join(self.problems))


class ProcessError(UserError):
    """A `UserError` that the other processes of a launch know nothing of."""


def printable(problem: str) -> str:
    """
    Return a message as one line of a bearable length: it may quote a file or a flag with whatever in it.
    """
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in problem
    )
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} [...] {line[-290:]}"


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of a bearable length."""
    return textwrap.shorten(str(error) or repr(error), width=300)


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, names: list[str]) -> str:
    """ ", did you mean X?" if one of `names` is close to `name`, else nothing."""
    close = [SYNONYMS[name]] if SYNONYMS.get(name) in names else []
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""
