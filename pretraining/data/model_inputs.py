"""Rows of tokens as the model takes them."""

from dataclasses import dataclass
from typing import Any

import torch

from pretraining.errors import ProcessError


@dataclass(frozen=True)
class ModelInputs:
    """
    `model_inputs(rows)` is what the model takes for rows of tokens.

    Attributes:
        device, vocab_size: the model's.
        document_token_id: see `document_positions`; None lets tokens see the documents before theirs.
    """

    device: torch.device
    vocab_size: int
    document_token_id: int | None = None

    def __call__(self, rows: torch.Tensor) -> dict[str, Any]:
        """
        Args:
            rows (`(B, T)`): token ids of any integer type.

        Raises:
            ProcessError: a ValueError, for an id that the model has no embedding for: a GPU would only say that an
                assertion failed, and could not be used any more.
        """
        if (largest := rows.numpy().max()) >= self.vocab_size:
            raise ProcessError(
                f"the data has the token id {largest}, but the model's vocabulary ends with {self.vocab_size - 1}: "
                "prepare the data with the model's tokenizer"
            )
        input_ids = rows.to(self.device, non_blocking=True).long()
        document_token_id = self.document_token_id
        position_ids = None if document_token_id is None else document_positions(input_ids, document_token_id)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}


def document_positions(input_ids: torch.Tensor, document_token_id: int) -> torch.Tensor:
    """
    Positions (B, T) that start again at each document of a row, which keeps documents apart in this model.

    The end-of-text token counts as the first of the document behind it: so its one place in a document teaches how to
    end one, by being predicted, and how to begin one, as it does when text is generated from nothing.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.where(input_ids == document_token_id, index, 0).cummax(-1).values
    return index - starts


def num_targets(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens a loss over labels (B, T) counts: the first of a row has nothing before it to be told from."""
    return (labels[:, 1:] != -100).sum()
