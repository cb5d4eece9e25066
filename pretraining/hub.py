"""What goes wrong on the Hub, or on the way to it, told in one line."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pretraining.arguments import UserError, one_line


class HubRefusal(UserError):
    """The Hub was reached, and does not allow it; asking again later will not help."""


@contextlib.contextmanager
def told(repo_id: str) -> Iterator[None]:
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
