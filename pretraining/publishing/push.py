"""What of a folder is published, and its way to the Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from pretraining.errors import UserError, one_line
from pretraining.hub import create_repository, hub_errors_as_user_errors
from pretraining.publishing.card_edits import card_with_stock_branch, renamed_card
from pretraining.publishing.eval_results import FOLDER as RESULTS
from pretraining.publishing.model_card import CARD
from pretraining.publishing.stock_branch import has_stock_form, is_half_pushed, push_stock_form, stock_form
from pretraining.publishing.usage import STOCK_BRANCH
from pretraining.records.run_files import PLOTS

CONFIG, CODE = "config.json", "modeling_gpt2scratch.py"
# Of the folder of a run, a checkpoint or an exported model, beside its code and card. No optimizer's state, log, or
# tracker's file, and nothing else that happens to lie there.
PUBLISHED = """config.json generation_config.json model.safetensors model-*-of-*.safetensors
    model.safetensors.index.json tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json
    added_tokens.json chat_template.jinja plots/*.png .eval_results/*.yaml
    model.gguf onnx/model.onnx onnx/model.onnx_data""".split()


def push(
    folder: Path,
    repo_id: str,
    private: bool,
    message: str,
    license: str | None = None,
    stock_branch: bool = False,
) -> str:
    """
    Publish a folder's model on the Hub, in one commit, its card under the repository's name. What was uploaded before
    an earlier attempt broke off is not uploaded again. Other files of the repository stay. Returns its address.

    Args:
        stock_branch: write the model's stock form, if it has one, to a branch first. A push that breaks off in between
            is noticed and completed by the next one.

    Raises:
        UserError: if card or weights cannot be read, or the Hub refuses or cannot be reached. There is no half of it.
    """
    files = published(folder)
    for path in files:
        if path.suffix == ".safetensors":
            _check_weights(path)
    text = read_card(folder)
    if str(folder.resolve()) in renamed_card(text, repo_id, license).text:
        raise UserError(f"{folder / CARD} tells a path of this machine, {folder.resolve()}: take it out")
    repo_id = create_repository(repo_id, private)  # its whole name
    card = renamed_card(text, repo_id, license)
    if stock_branch and has_stock_form(folder):
        with hub_errors_as_user_errors(repo_id):
            if is_half_pushed(repo_id, folder):
                print(f"{repo_id}: the branch {STOCK_BRANCH} was written, but main was not; this push completes it")
        results = [path for path in files if path.parent.name in (PLOTS, RESULTS)]
        with stock_form(folder) as (form, config), hub_errors_as_user_errors(repo_id):
            push_stock_form(form, folder, results, repo_id, card, config)
            card = card_with_stock_branch(card, repo_id, config)
    with hub_errors_as_user_errors(repo_id):
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        operations.append(CommitOperationAdd(CARD, str(card).encode()))
        commit = HfApi().create_commit(repo_id, operations, commit_message=message)
    return f"{repo_id}, revision {commit.oid}"


def published(folder: Path) -> list[Path]:
    """
    What of a folder is published, but for the card.

    Raises:
        UserError: if a file of the model's code is missing, one that its config names or another file imports.
    """
    files = {path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}
    return sorted(files | _code(folder))


def _code(folder: Path) -> set[Path]:
    """The model's code, whatever version of it wrote the folder: what transformers fetches when it loads it."""
    config = (folder / CONFIG).read_bytes() if (folder / CONFIG).is_file() else b""
    names_code = (
        f'"{Path(CODE).stem}.'.encode() in config
    )  # of another repository it would be "USER/NAME--modeling..."
    if not names_code and not (folder / CODE).exists():
        return set()
    try:
        code = {folder / CODE, *map(Path, get_relative_import_files(folder / CODE))}
    except (OSError, ValueError) as error:  # a file that is missing, or no text
        raise UserError(f"{folder} has not all of the model's code: {one_line(error)}") from None
    if outside := [path for path in code if not path.resolve().is_relative_to(folder.resolve())]:
        raise UserError(f"{folder / CODE} imports {min(outside)}, which is outside of the folder")
    return code


def read_card(folder: Path) -> str | None:
    """
    Raises:
        UserError: if there is one that cannot be read.
    """
    try:
        return (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CARD} cannot be read: {one_line(error)}") from None


def _check_weights(path: Path) -> None:
    """That the file is as long as it says, which one that was half copied is not."""
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, and is not published: {one_line(error)}") from None
