"""Every command in README, docs, recipes' heads and scripts' docstrings runs as it stands, on smaller data."""

import ast
import functools
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY, make_documents, run, script, succeed
from support.generated_items import generated_records, write_items
from support.hub_server import Hub
from support.local_tasks import OWN_TASKS_ALONE, write_tasks
from support.processes import run_ranks
from transformers import GPT2Config, GPT2LMHeadModel

from pretraining.cli import parse_arguments
from pretraining.tokenization.tokenizer import train_tokenizer
from pretraining.training.flags import TrainArguments

DOCUMENTS = make_documents(300, seed=5)
REQUIREMENTS = ["requirements.txt", "requirements-dev.txt"]
SCRIPTS = """train_accelerate.py prepare_data.py eval_hellaswag.py eval_harness.py generate.py
    publish_model.py""".split()
# In this order: the first of them makes data/demo and runs/demo, which the others use.
PAGES = ["configs/demo.yaml", "README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/*.md"))
PAGES += sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("configs/*.yaml"))
PAGES = [*dict.fromkeys(PAGES), *SCRIPTS]
# A smaller model, on less data, for fewer steps. The last one of a flag counts.
SMALLER = {
    "prepare_data.py": "--block_size 32 --num_proc 1",
    "train_accelerate.py": """--block_size 32 --per_device_train_batch_size 2 --max_steps 2 --warmup_steps 0
        --tokens_per_step 128 --eval_iters 1 --torch_compile False --dataloader_num_workers 0 --report_to none""",
    "eval_hellaswag.py": "",
    "eval_harness.py": "--tasks tasks/four.yaml --limit 2",
    "generate.py": "--max_new_tokens 3",
    "publish_model.py": "",
}
SMALL_MODEL = "n_layer=1,n_embd=32,n_head=2,n_positions=128"


@dataclass
class World:
    """A folder like the repository's, beside which another project lies, and a Hub that has what the pages name."""

    folder: Path
    environment: dict[str, str]
    done: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "gpt2scratch"
    for name in ("texts", "library", "../build-nanogpt/edu_fineweb10B"):
        (folder / name).mkdir(parents=True)
    for name in ("configs", "metrics", "accelerate_config.yaml", "Makefile", *REQUIREMENTS):
        (folder / name).symlink_to(REPOSITORY / name)
    for number, text in enumerate(DOCUMENTS):
        (folder / f"texts/{number}.txt").write_text(text)
        (folder / f"library/{number}.py").write_text(text)
    (folder / "prompts.txt").write_text("def \nclass \n")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    write_items(folder / "hellaswag_val.jsonl", generated_records(4))
    ids = np.random.default_rng(0).integers(0, 320, 4000).astype(np.uint16)
    for name in ("train_000001", "val_000000"):
        np.save(folder / f"../build-nanogpt/edu_fineweb10B/edufineweb_{name}.npy", ids)
    tokenizer = train_tokenizer(DOCUMENTS, 320)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=1, n_head=2))
    for part in (gpt2, tokenizer):
        part.save_pretrained(tmp_path_factory.getbasetemp() / "gpt2")
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path_factory.getbasetemp() / "gpt2").iterdir()}
        hub.add("openai-community/gpt2", files, "model")
        hub.add("roneneldan/TinyStories", {"data/train-00000.parquet": parquet({"text": DOCUMENTS})})
        header = np.array([20240520, 1, len(ids), *[0] * 253], np.int32).tobytes()
        names = ("fineweb_train_000001.bin", "fineweb_val_000000.bin")
        hub.add("kjj0/fineweb10B-gpt2", {name: header + ids.tobytes() for name in names})
        hub.add("HuggingFaceFW/fineweb-edu", samples("sample-10BT", "sample-100BT"))
        items = [{**record, "label": str(record["label"])} for record in generated_records(4)]
        columns = {name: [item[name] for item in items] for name in items[0]}
        hub.add("Rowan/hellaswag", {"data/validation-00000.parquet": parquet(columns)})
        yield World(folder, hub.environment(tmp_path_factory.mktemp("home")))


def parquet(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def samples(*names: str) -> dict[str, bytes]:
    """A dataset that has several configurations."""
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in names]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    return {"README.md": card.encode(), **{f"{name}/0.parquet": parquet({"text": DOCUMENTS}) for name in names}}


def commands_of(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text()
    if page.endswith(".md"):
        lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    elif page.endswith(".py"):
        lines = "\n".join(line for line in ast.get_docstring(ast.parse(text)).splitlines() if line.startswith("    "))
    else:
        lines = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#   "))
    commands: list[str] = []
    for line in lines.replace("\\\n", " ").splitlines():
        line = " ".join(line.split())
        if line.startswith("--"):  # flags to add to the command before
            line = f"{commands[-1]} {line}"
        if line and not line.endswith("..."):
            commands.append(line)
    return commands


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_the_commands_of_a_page_run_as_they_stand(page, world):
    for command in commands_of(page):
        if command not in world.done:
            run_command(command, world)
            world.done.add(command)


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md") and code_of(page)])
def test_the_python_of_a_page_runs_as_it_stands(page, world):
    for number, code in enumerate(code_of(page)):
        run_code(code.replace('"124M"', '"124M", n_layer=1, n_embd=48, n_head=4'), f"{number}", world)


def run_command(command: str, world: World) -> None:
    words = shlex.split(command.replace("USER/", "tester/"), comments=True)
    options = {"cwd": world.folder, **world.environment}
    match words:
        case ["source", ".venv/bin/activate"] | ["hf", "auth", "login"]:
            pass  # of the person's own shell
        case ["make", target]:
            succeed(subprocess.run(["make", "-n", target], cwd=world.folder, capture_output=True, text=True))
        case ["curl", "--create-dirs", "--output", path, _]:
            (world.folder / path).write_text("\n".join(DOCUMENTS))
        case ["hf", "upload", *arguments]:
            succeed(run(Path(sys.executable).with_name("hf"), "upload", *arguments, **options))
        case ["python", "-c", code, *arguments]:
            if "lm_eval" in code:
                code = OWN_TASKS_ALONE + code
                arguments[arguments.index("--tasks") + 1 :] = ["tasks/four.yaml", "--limit", "2"]
            run_code(code, "-c", world, *arguments)
        case ["python", name, *arguments]:
            run_script(name, arguments, 1, world, "no")
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            config = yaml.safe_load((REPOSITORY / (launch.config_file or "configs/cpu.yaml")).read_text())
            number = launch.num_processes or config["num_processes"]
            ranks = 2 if number != "gpu" and number > 1 else 1
            precision = launch.mixed_precision or "no"
            run_script(launch.training_script, launch.training_script_args, ranks, world, precision)
        case _:
            raise AssertionError(f"nobody runs this: {command}")


def run_script(name: str, arguments: list[str], ranks: int, world: World, precision: str) -> None:
    arguments = [*arguments, *SMALLER[name].split(), *smaller(name, arguments)]
    options = {"cwd": world.folder, "ACCELERATE_MIXED_PRECISION": precision, **world.environment}
    faults = {0: functools.partial(small_library, world.folder / "library")} if name == "prepare_data.py" else {}
    made = {"train_accelerate.py": "model.safetensors", "prepare_data.py": "dataset.json"}.get(name)
    if made:
        output_dir = world.folder / value_of("output_dir", arguments)
        shutil.rmtree(output_dir, ignore_errors=True)  # of another command
    for result in run_ranks(ranks, name, *arguments, faults=faults, **options):
        succeed(result)
    assert made is None or (output_dir / made).exists()


def smaller(name: str, arguments: list[str]) -> list[str]:
    """What to make smaller depends on what the command says."""
    if name == "prepare_data.py" and not value_of("tokenizer_name", arguments):
        return ["--tokenizer_vocab_size", "320"]
    is_new = name == "train_accelerate.py" and not value_of("model_name_or_path", arguments)
    return ["--config_overrides", SMALL_MODEL] if is_new else []


def value_of(name: str, arguments: list[str]) -> str | None:
    """Of a flag, or of the recipe."""
    if f"--{name}" in arguments:
        return arguments[arguments.index(f"--{name}") + 1]
    if "--config" not in arguments:
        return None
    recipe = yaml.safe_load((REPOSITORY / arguments[arguments.index("--config") + 1]).read_text())
    return recipe.get(name)


def small_library(folder: Path) -> None:
    """The standard library is another one, whose files are few."""
    paths = sysconfig.get_paths()
    sysconfig.get_paths = lambda: {**paths, "stdlib": str(folder)}


def run_code(code: str, name: str, world: World, *arguments: str) -> None:
    path = world.folder / f"code{name}.py"
    path.write_text(code.replace("USER/", "tester/"))
    succeed(script(path, *arguments, cwd=world.folder, **world.environment))


def test_a_command_that_nobody_runs_is_an_error(world):
    with pytest.raises(AssertionError, match="nobody runs this: rm -rf"):
        run_command("rm -rf runs", world)


def test_the_commands_of_the_benchmarks_are_valid():
    pages = [*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("benchmarks/*.py")]
    pattern = r"python benchmarks/(\w+)\.py([^\n`#]*)"
    texts = [re.sub(r"\\+\n", " ", page.read_text()) for page in pages]
    commands = [command for text in texts for command in re.findall(pattern, text)]
    assert {name for name, _ in commands} >= {"training_step", "hellaswag", "data", "optimizers", "report"}
    for name, flags in commands:
        if name != "report":
            arguments = importlib.import_module(f"benchmarks.{name}").BenchmarkArguments
            parse_arguments(arguments, "", shlex.split(flags))


def test_the_sizes_in_the_readme_take_what_their_recipes_estimate():
    text = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\| \[.*\]\((configs/.*)\) \| (.*) billion \| (.*) \| (\$.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for path, billions, time, cost in rows:
        head = " ".join((REPOSITORY / path).read_text().replace("\n#", "").split())
        assert f"{time} on eight; {cost}, at" in head
        recipe = parse_arguments(TrainArguments, "", ["--config", str(REPOSITORY / path)])
        assert round(recipe.max_steps * recipe.tokens_per_step / 1e9, 1) == float(billions)


# What a message may hold in the place of a value.
ANYTHING = "(.+?)"


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program():
    sources = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("pretraining/**/*.py")]
    patterns = {pattern for path in sources for pattern in messages_of(ast.parse(path.read_text()))}
    page = (REPOSITORY / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    assert len(messages) > 15
    unknown = [message for message in messages if not any(re.fullmatch(pattern, message) for pattern in patterns)]
    assert unknown == []


def messages_of(tree: ast.AST) -> list[str]:
    """Patterns of the texts in it that are long enough to be a message."""
    found = []
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        constants = [part.value for part in parts if isinstance(part, ast.Constant)]
        if all(isinstance(text, str) for text in constants) and len("".join(constants)) > 15:
            found.append(
                "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ANYTHING for p in parts) + "(.*)"
            )
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_the_links_of_a_page_lead_somewhere(page):
    path = REPOSITORY / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        if not name.startswith("http"):
            target = (path.parent / name) if name else path
            assert target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
                assert anchor in anchors, link


# Flags of other programs that the pages speak of: accelerate launch, sbatch, lm_eval; and what stands for any flag.
OTHERS = set(
    """config_file cpu quiet mixed_precision num_processes num_machines num_cpu_threads_per_process multi_gpu
    requeue model model_args tasks config help flag""".split()
)


SUFFIXES = "json|safetensors|gguf|onnx"  # `model.onnx` is no attribute of model.py


@functools.cache
def our_flags() -> set[str]:
    names = [path.stem for path in REPOSITORY.glob("*.py")]
    names += [f"benchmarks.{path.stem}" for path in REPOSITORY.glob("benchmarks/*.py")]
    found = [vars(importlib.import_module(name)).items() for name in names]
    classes = [value for items in found for name, value in items if name.endswith("Arguments") and is_dataclass(value)]
    return {field.name for each in classes for field in fields(each)}


@functools.cache
def definitions() -> dict[str, set[str]]:
    """The names of functions, classes and constants, by the file's name."""
    folders = ("modeling_gpt2scratch", "pretraining", "benchmarks", "tests", "metrics/hellaswag")
    found: dict[str, set[str]] = {}
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    for path in [*REPOSITORY.glob("*.py"), *paths]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        found[path.name] = names | {node.id for node in nodes if isinstance(node, ast.Name)}
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_what_a_page_names_is_there(page):
    names = definitions()
    tests = [name for file in names if file.startswith("test_") for name in names[file]]
    for span in re.findall(r"`([^`\n]+)`", (REPOSITORY / page).read_text()):
        if re.fullmatch(r"[\w/]+\.py", span):
            assert (REPOSITORY / span).is_file() or span in names
        elif (attribute := re.fullmatch(rf"(\w+)\.(?!{SUFFIXES})(\w+)", span)) and f"{attribute[1]}.py" in names:
            assert attribute[2] in names[f"{attribute[1]}.py"], span
        elif span.startswith("test_") and span.endswith("…"):
            assert any(test.startswith(span.removesuffix("…")) for test in tests), span
        assert set(re.findall(r"--([a-z]\w+)", span)) <= our_flags() | OTHERS, span


def test_every_file_has_its_place_in_the_table_of_where_a_change_belongs():
    page = (REPOSITORY / "docs/how-it-works.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("|"))
    files = [
        path for name in ("pretraining", "modeling_gpt2scratch") for path in (REPOSITORY / name).rglob("[!_]*.py")
    ]
    assert [path.name for path in files if not re.search(rf"[`/]{path.name}`", rows)] == []
