"""Command lines and recipes: one meaning each, and every mistake named at once."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import eval_harness
import eval_hellaswag
import generate
import prepare_data
import publish_model
import train_accelerate
from pretraining.cli import flag, parse_arguments, parse_settings
from pretraining.errors import UserError
from pretraining.training.flags import TrainArguments

WSD = "--lr_scheduler_type warmup_stable_decay --warmup_steps 100 --lr_scheduler_kwargs".split()


@dataclass
class Arguments:
    max_steps: int = flag(10, "steps")
    learning_rate: float = flag(1e-3, "rate")
    optim: Literal["adamw", "muon"] = flag("adamw", "optimizer")
    gradient_checkpointing: bool = flag(False, "recompute")
    prompts: list[str] = flag([""], "texts", nargs="+")
    data_dir: str = flag(None, "folder")

    def problems(self) -> list[str]:
        return ["--max_steps must be at least 1"] if self.max_steps < 1 else []


def parse(*argv: str) -> Arguments:
    return parse_arguments(Arguments, "a test", list(argv))


def test_the_recipe_fills_in_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "max_steps: 20\nlearning_rate: 6e-4\ngradient_checkpointing: true\nprompts: [a b, c]\ndata_dir:\n"
    )
    arguments = parse("--max_steps", "30", "--config", str(recipe))
    # YAML reads 6e-4 as text: it has to become a number all the same.
    assert (arguments.max_steps, arguments.learning_rate) == (30, 6e-4)
    assert arguments.gradient_checkpointing is True
    assert arguments.prompts == ["a b", "c"]
    assert arguments.data_dir is None
    assert parse().prompts == [""]


def test_all_problems_are_reported_at_once_with_the_nearest_names(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1\noptim: sgd\n")
    with pytest.raises(UserError) as error:
        parse("--config", str(recipe), "--max_step", "5", "--learning_rate", "fast", "--max_steps", "0", "stray")
    text = "\n".join(error.value.problems)
    for expected in (
        "unknown key 'learning_rat', did you mean learning_rate?",
        "--optim: invalid choice: 'sgd'",
        "unknown flag --max_step, did you mean --max_steps?",
        "--learning_rate: invalid float value: 'fast'",
        "--max_steps must be at least 1",
        "'stray' is not a flag",
    ):
        assert expected in text
    assert len(error.value.problems) == 6


def test_a_flag_is_not_taken_for_another_that_begins_alike():
    with pytest.raises(UserError, match="unknown flag --optimizer, did you mean --optim"):
        parse("--optimizer", "muon")


def test_what_people_know_from_elsewhere_has_a_name_here():
    with pytest.raises(UserError, match="unknown flag --lr, did you mean --learning_rate"):
        parse("--lr", "1")


def test_a_pattern_that_the_shell_has_replaced_by_files_is_one_line(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(5)]
    for file in files:
        file.write_text("")
    with pytest.raises(UserError) as error:
        parse("--data_dir", *map(str, files))
    assert error.value.problems == (
        f"'{files[1]}' and 3 more are not flags: a pattern goes in quotes, as 'texts/*.txt'",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("a: [", "not valid YAML"), ("- a\n- b\n", "must hold 'name: value' lines")],
)
def test_a_recipe_that_cannot_be_read_is_named(content, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        parse("--config", str(recipe), "--max_steps", "0")
    assert str(recipe) in str(error.value)
    assert len(error.value.problems) == 1  # what the recipe would have said is not missing


# Their --help.
SCRIPTS = [train_accelerate, prepare_data, eval_hellaswag, eval_harness, generate, publish_model]


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_help_is_in_groups_of_a_screen_and_begins_with_examples(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"^    (python|accelerate launch) .*\.py --", text, re.MULTILINE)
    _, *groups = re.split(r"^(?=\S.*:$)", text[text.index("\noptions:") :], flags=re.MULTILINE)
    assert len(groups) >= 2
    assert all(len(group.splitlines()) <= 50 for group in groups)
    (arguments,) = (cls for cls in vars(module).values() if getattr(cls, "__name__", "").endswith("Arguments"))
    for field in dataclasses.fields(arguments):
        assert len(re.findall(rf"^  --{field.name}\b", text, re.MULTILINE)) == 1
    assert "--learning_rate X" in text or module is not train_accelerate


def test_what_cannot_be_the_name_of_a_file_is_refused():
    for value, reason in (("a" * 300, "File name too long"), ("a\0b", "embedded null byte")):
        with pytest.raises(UserError) as error:
            parse_arguments(TrainArguments, "", ["--output_dir", value, "--data_dir", "data"])
        (problem,) = error.value.problems
        assert problem.startswith("--output_dir a") and problem.endswith(f"... cannot be the name of a file: {reason}")


def test_a_message_is_one_line_of_a_bearable_length_whatever_it_quotes():
    error = UserError("a\nb\x00\ud800 é", "x" * 5000)
    assert error.problems[0] == "a\\nb\\x00\\ud800 é"
    assert len(error.problems[1]) < 1300 and " [...] " in error.problems[1]


@dataclass(frozen=True)
class Settings:
    rate: float = 1.0
    steps: int | None = None
    form: Literal["linear", "cosine"] = "linear"
    cautious: bool = False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Settings()),
        ("", Settings()),
        ("rate=2e-1, steps=3,cautious=true", Settings(rate=0.2, steps=3, cautious=True)),
        ("rate=2,form=cosine", Settings(rate=2.0, form="cosine")),
        ('{"rate": 0.5, "steps": null, "form": "cosine"}', Settings(rate=0.5, form="cosine")),
        ('{"rate": "5e-1"}', Settings(rate=0.5)),  # as YAML reads it
    ],
)
def test_settings_are_written_as_pairs_or_as_a_mapping(text, expected):
    found = parse_settings("--settings", text, Settings)
    assert found == expected and type(found.rate) is float


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("rat=2,step=1", ["has no 'rat', did you mean rate?", "has no 'step', did you mean steps?"]),
        ("rate=fast,cautious=1,steps=1.5", ["rate must be", "cautious must be", "steps must be"]),
        ("rate=true", ["rate must be of type float, got True"]),
        ("rate=" + "9" * 400, ["rate must be of type float, got 9999"]),
        ('{"2024-01-01": 1}', ["has no '2024-01-01'"]),
        ("rate", ["'rate' is not name=value"]),
        ("{rate: 2}", ["Expecting property name"]),
        ('{"rate": {"a": 1}}', ["rate must be of type float, got {'a': 1}"]),
    ],
)
def test_settings_that_are_none_are_named(text, problems):
    with pytest.raises(UserError) as error:
        parse_settings("--settings", text, Settings)
    assert len(error.value.problems) == len(problems)
    for found, expected in zip(error.value.problems, problems, strict=True):
        assert found.startswith("--settings") and expected in found


def test_settings_of_a_recipe_may_be_a_mapping_and_decide_the_run_however_they_are_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: run\noptim: muon\noptim_args: {head_lr: 0.5, normuon_beta2: 0.95, vector_lr: 1}\n")
    as_mapping = parse_arguments(TrainArguments, "", ["--config", str(recipe), "--data_dir", "data"])
    words = ["--output_dir", "run", "--data_dir", "data", "--optim", "muon"]
    as_pairs = parse_arguments(TrainArguments, "", [*words, "--optim_args", "normuon_beta2=0.95,head_lr=0.5"])
    assert as_mapping.settings() == as_pairs.settings()
    assert as_pairs.settings()["optim_args"] == {"head_lr": 0.5, "normuon_beta2": 0.95}
    assert as_pairs.settings()["lr_scheduler_kwargs"] == {}


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["--adam_beta2", "1", "--adam_epsilon", "0"], ["--adam_beta2 must be at least 0", "--adam_epsilon must be"]),
        (["--optim_args", "muon_momentum=0.9"], ["--optim_args: muon_momentum is for --optim muon"]),
        (["--optim_args", "muon_momentum_warmup_steps=9"], ["muon_momentum_warmup_steps is for --optim muon"]),
        (["--optim", "muon", "--optim_args", "muon_scale=big"], ["muon_scale must be rms or spectral, got big"]),
        (["--optim_args", "head_lr=-1,vector_lr=nan"], ["head_lr must be a finite", "vector_lr must be a finite"]),
        (["--optim", "muon", "--optim_args", "normuon_beta2=1"], ["normuon_beta2 must be at least 0 and below 1"]),
        (["--lr_scheduler_kwargs", "decay_fraction=0.5"], ["is for --lr_scheduler_type warmup_stable_decay"]),
        (["--lr_scheduler_kwargs", "min_lr_rate=2"], ["min_lr_rate must be 0 to 1, got 2.0"]),
        ([*WSD, "num_decay_steps=950"], ["num_decay_steps must be 1 to 900, the steps after the warm-up, got 950"]),
        ([*WSD, "num_decay_steps=10,decay_fraction=0.5"], ["num_decay_steps and decay_fraction say the same"]),
        ([*WSD, "decay_fraction=0"], ["decay_fraction must be above 0 and at most 1, got 0.0"]),
        (["--max_train_files", "2"], ["--max_train_files is for a --dataset_name of token files"]),
        ([*WSD, "decay_type=square"], ["decay_type must be linear, cosine, 1-sqrt, got square"]),
    ],
)
def test_settings_that_make_no_optimizer_or_schedule_are_named(words, problems):
    with pytest.raises(UserError) as error:
        parse_arguments(TrainArguments, "", ["--output_dir", "run", "--data_dir", "data", *words])
    assert len(error.value.problems) == len(problems)
    for found, expected in zip(error.value.problems, problems, strict=True):
        assert expected in found
