"""Command lines and recipes: a dataclass of flags, filled from a YAML file and then from the command line."""

import argparse
import contextlib
import copy
import dataclasses
import errno
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from pretraining.errors import ProcessError, UserError, nearest, one_line

T = TypeVar("T")
PATH_FLAGS = ("_dir", "_file", "_name", "_path", "resume_from_checkpoint")  # ends of names


def flag(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field that becomes a `--flag` of the same name."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def parse_arguments(arguments_class: type[T], description: str, argv: list[str] | None = None) -> T:
    """
    Read `--config recipe.yaml` if there is one, then the command line, which wins.

    Args:
        arguments_class: a dataclass whose fields are the flags, or one that inherits them from dataclasses with an
            `_argument_group_name`, which --help shows as groups. If it has a method `problems() -> list[str]`, that is
            asked about values that do not fit together.
        argv: the command line, `sys.argv[1:]` if left out.

    Raises:
        UserError: with every problem found: unknown flags and recipe keys (with the nearest real name), values of the
            wrong type, and what `problems` returned.
    """
    names = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
    argv = list(sys.argv[1:] if argv is None else argv)
    problems: list[str] = []
    recipe_argv = _recipe_argv(_option_value(argv, "--config"), names, problems)
    namespace, unknown = _parse_all(_parser(arguments_class, description), recipe_argv + argv, problems)
    problems += [_unknown_flag(word, names) for word in unknown if word.startswith("--")]
    problems += _problems_of_stray_words(_stray_words(unknown))

    arguments = arguments_class(**{name: getattr(namespace, name) for name in names})
    if paths := problems_of_paths(arguments):
        raise UserError(*problems, *paths)  # the others could not look at them
    if hasattr(arguments, "problems"):
        problems += arguments.problems()
    if problems:
        raise UserError(*problems)
    return arguments


def problems_of_range(args: object, names: list[str], least: int, most: int | None = None) -> list[str]:
    """Of each of these flags that is given, and has a value outside of `least` to `most`."""
    values = {name: getattr(args, name) for name in names}
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    return [
        f"--{name} must be {wanted}, got {value}"
        for name, value in values.items()
        if value is not None and (value < least or (most is not None and value > most))
    ]


def problems_of_paths(args: object) -> list[str]:
    """Return a message for each value of a flag that names files but cannot be the name of one."""
    found = []
    for name, value in vars(args).items():
        if isinstance(value, str) and name.endswith(PATH_FLAGS):
            try:
                os.stat(value)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
                    found.append(f"--{name} {value[:60]}... cannot be the name of a file: {reason}")
    return found


def parse_pairs(flag_name: str, text: str) -> dict[str, Any]:
    """
    Parse `n_layer=4,qkv_bias=false`, or the same as a JSON object, which a mapping in a recipe becomes.

    Raises:
        UserError: for what is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            mapping = dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag_name} {text[:60]}: {one_line(error)}") from None
        # YAML takes 1e-3 for a text.
        return {key: _to_value(value) if isinstance(value, str) else value for key, value in mapping.items()}
    items = [item.strip() for item in text.split(",") if item.strip()]
    if problems := [f"{flag_name}: '{item}' is not name=value" for item in items if "=" not in item]:
        raise UserError(*problems)
    pairs = (item.split("=", 1) for item in items)
    return {key.strip(): _to_value(value.strip()) for key, value in pairs}


def _to_value(text: str) -> int | float | bool | str | None:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def parse_settings(flag_name: str, text: str | None, settings_class: type[T]) -> T:
    """
    Parse what `parse_pairs` does, or None, as an instance of a dataclass whose fields all have defaults.

    Raises:
        UserError: with every name that is none of the fields, and every value of another type than its field.
    """
    fields = {field.name: field for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    pairs, problems = parse_pairs(flag_name, text or ""), []
    types = get_type_hints(settings_class)
    for key, value in pairs.items():
        if key not in fields:
            problems.append(f"{flag_name} has no '{key}'{nearest(key, list(fields))}")
            continue
        wanted = types[key] if get_origin(types[key]) is not Literal else str
        if wanted is float and type(value) is int:
            with contextlib.suppress(OverflowError):
                pairs[key] = value = float(value)
        if not isinstance(value, wanted) or (type(value) is bool) != (wanted is bool):
            kind = getattr(wanted, "__name__", str(wanted))
            problems.append(f"{flag_name}: {key} must be of type {kind}, got {value!r}")
    if problems:
        raise UserError(*problems)
    return settings_class(**pairs)


def format_settings(value: object) -> str:
    """Return a setting as it is written on a command line, pairs among them."""
    return ",".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else str(value)


def changed_settings(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass that differ from its defaults."""
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what the user can put right is printed as one line a problem, with exit status 2."""
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it tells of each try; what comes of them is told once
    try:
        main()
    except UserError as error:
        # All processes of a launch find the same problems, most often: say those once.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, ProcessError):
            for problem in error.problems:
                print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _reader_is_gone() -> bool:
    """Return True if nobody reads standard output any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser(arguments_class: type, description: str) -> HfArgumentParser:
    groups = [base for base in reversed(arguments_class.__mro__) if "_argument_group_name" in vars(base)]
    parser = HfArgumentParser(
        groups or arguments_class,  # type: ignore[arg-type]
        description=description,
        allow_abbrev=False,  # which would turn a mistyped `--eval` silently into `--eval_steps`
        exit_on_error=False,
        usage="%(prog)s [--config recipe.yaml] [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    about = "a YAML recipe: flag names without the dashes, and values"
    parser.add_argument("--config", type=str, metavar="FILE", help=about)
    return parser


def _parse_all(parser: HfArgumentParser, argv: list[str], problems: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_known_args`, which stops at the first value it cannot convert: that is noted, and left out."""
    while True:
        try:
            return parser.parse_known_args(argv)
        except argparse.ArgumentError as error:
            options = (error.argument_name or "").split("/")
            problems.append(f"{options[0]}: {error.message}" if error.argument_name else error.message)
            remaining = _without_option(argv, options)
            if len(remaining) == len(argv):
                raise UserError(*problems) from None
            argv = remaining


METAVARS = {int: "N", float: "X", str: "TEXT"}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, tells defaults where there is one to tell, and each flag by one name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default in ([], [""])
        return action.help if says_nothing else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, "true|false")  # type: ignore[call-overload]

    def _format_action_invocation(self, action: argparse.Action) -> str:
        action = copy.copy(action)  # without `--data-dir`, which HfArgumentParser takes for `--data_dir`
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(action)


def _read_recipe(path: str | None) -> dict:
    """
    Raises:
        UserError: at once, as without it other flags would seem to be missing.
    """
    if path is None:
        return {}
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and bytes that are none
        raise UserError(f"--config {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold 'name: value' lines, got a {type(recipe).__name__}")
    return recipe


def _recipe_argv(path: str | None, names: list[str], problems: list[str]) -> list[str]:
    """A recipe as the words of a command line, so that argparse converts and checks both in the same way."""
    argv = []
    for key, value in _read_recipe(path).items():
        if key not in names:
            problems.append(f"{path}: unknown key '{key}'{nearest(str(key), names)}")
        elif value is not None and value != []:
            values = value if isinstance(value, list) else [value]
            argv += [
                f"--{key}",
                *(_as_json(value) if isinstance(value, dict) else str(value) for value in values),
            ]
    return argv


def _as_json(mapping: dict) -> str:
    return json.dumps({str(key): value for key, value in mapping.items()}, default=str)


def _option_value(argv: list[str], option: str) -> str | None:
    """The last value given to `option`, as `--option value` or `--option=value`."""
    value = None
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            value = argv[index + 1]
        elif word.startswith(option + "="):
            value = word.removeprefix(option + "=")
    return value


def _without_option(argv: list[str], options: list[str]) -> list[str]:
    """`argv` without any of `options` and the values that follow it."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word.split("=")[0] in options
        if not dropping:
            kept.append(word)
    return kept


def _unknown_flag(word: str, names: list[str]) -> str:
    name = word.split("=")[0].removeprefix("--")
    guess = nearest(name.replace("-", "_"), [*names, "config"])
    return f"unknown flag --{name}{guess.replace('mean ', 'mean --')}"


def _stray_words(unknown: list[str]) -> list[str]:
    """Words that belong to no flag at all: the value behind an unknown flag is that flag's, not reported again."""
    return [
        word
        for index, word in enumerate(unknown)
        if not word.startswith("--") and (index == 0 or not unknown[index - 1].startswith("--"))
    ]


def _problems_of_stray_words(words: list[str]) -> list[str]:
    """Several files, where there should be one pattern, are what a shell makes of a pattern."""
    if len(words) > 1 and all(os.path.exists(word) for word in words):
        return [f"'{words[0]}' and {len(words) - 1} more are not flags: a pattern goes in quotes, as 'texts/*.txt'"]
    return [f"'{word}' is not a flag" for word in words]
