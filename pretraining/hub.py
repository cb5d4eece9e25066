"""Repositories on the Hub, and what goes wrong there or on the way to it, told in one line."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pretraining.cli import flag
from pretraining.errors import UserError, one_line

RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)  # between tries: five minutes, for a Hub that is restarted
LICENSE = "mit"  # of the weights, unless --license says otherwise


class HubRefusal(UserError):
    """The Hub was reached, and does not allow it; asking again later will not help."""


def check_name(name: str) -> None:
    """
    Raises:
        FileNotFoundError: if the name of a model or tokenizer can only be that of a folder which is not there. The Hub
            would be asked for it, and without a network that takes a minute.
    """
    parts = Path(name).parts
    is_path = name.startswith((".", "/", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())
    if is_path and not Path(name).exists():
        raise FileNotFoundError("there is no such folder")


@dataclass
class HubFlags:
    """The flags of a script that publishes a model."""

    _argument_group_name = "the Hub"

    push_to_hub: bool = flag(False, "publish the model on the Hub")
    hub_model_id: str | None = flag(None, "under this name; that of its folder if left out")
    stock_branch: bool = flag(
        True, "also put the model, as a stock GPT-2 that needs no remote code, on the branch gpt2 of the repository"
    )
    hub_private_repo: bool = flag(False, "make the repository a private one, if it is not there yet")
    license: str | None = flag(
        None, f"of the weights, as the Hub names it; if left out, as the model card has it, {LICENSE} in a new one"
    )

    def problems_of_hub(self) -> list[str]:
        """Return a message for each flag that is given without the flag that it needs, or is not as the Hub has it."""
        found = ["--hub_model_id is empty"] if self.hub_model_id == "" else []
        if not self.push_to_hub:
            given = [name for name in ("hub_model_id", "hub_private_repo") if getattr(self, name)]
            found += [f"--{name} {getattr(self, name)} is for --push_to_hub: give both" for name in given]
        # The Hub's names are of small letters, digits, points and dashes.
        if self.license is not None and not re.fullmatch(r"[a-z0-9.+-]+", self.license):
            found.append(
                f"--license {self.license} is not a name as the Hub has them, such as mit, apache-2.0 or cc-by-4.0"
            )
        return found


@contextlib.contextmanager
def hub_errors_as_user_errors(repo_id: str) -> Iterator[None]:
    """What goes wrong within, on the Hub or on the way to it, becomes a `UserError` of one line."""
    try:
        yield
    except Exception as error:  # a refused token, no network, a full repository: of several libraries
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        is_refusal = 400 <= status < 500 and status not in (408, 429)  # not a time-out, nor too many requests
        is_refusal |= isinstance(error, LocalTokenNotFoundError | ValueError)  # a name or metadata that is not valid
        problem = one_line(error)
        if status in (401, 403):
            problem += " (`hf auth login`, or HF_TOKEN, with a token that may write)"
        elif isinstance(error, HFValidationError):
            problem += " (--hub_model_id gives it another name)"
        elif not is_refusal:
            problem += f" ({constants.ENDPOINT})"
        raise (HubRefusal if is_refusal else UserError)(f"--push_to_hub {repo_id} failed: {problem}") from None


def create_repository(repo_id: str, private: bool, license: str | None = None, repo_type: str = "model") -> str:
    """
    Make a repository on the Hub, if it is not there. Returns its whole name, with the user's.

    Args:
        license: of a model's weights, if the Hub is to check now what it will check when there is a card.
        repo_type: "model" or "dataset".

    Raises:
        UserError: if the Hub cannot be reached; HubRefusal if it refuses that, or to write there.
    """
    api = HfApi()
    with hub_errors_as_user_errors(repo_id):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)  # one that was there may be one to read only
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError("it is there, and public: leave --hub_private_repo out, or make it private there")
        if license:
            ModelCard(f"---\nlicense: {license}\n---\n").validate()
    return repo_id
