"""Write the final model, a folder that loads with the Auto classes and a pipeline."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pretraining.checkpoints.folders import FINAL
from pretraining.errors import one_line
from pretraining.files import INCOMPLETE
from pretraining.records.run_files import WEIGHTS


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    write_card: Callable[[Path], None],
    output_dir: Path,
    state_dict: dict,
) -> None:
    """
    Write the final model into `output_dir`. The weights are put there last: where they are, the rest is whole.

    Args:
        write_card: writes the model's card, and what belongs to it, into a folder.
        state_dict: the full weights, gathered from all processes.
    """
    folder = output_dir / (FINAL + INCOMPLETE)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, state_dict=state_dict)
    write_tokenizer(tokenizer, model.config.n_positions, folder)
    write_card(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == WEIGHTS):
        if path.is_dir():
            shutil.rmtree(output_dir / path.name, ignore_errors=True)
        os.replace(path, output_dir / path.name)
    folder.rmdir()


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, n_positions: int, folder: Path) -> None:
    """What a pipeline needs beside a model: the tokenizer, and how to generate."""
    # A pipeline asks for 256 new tokens if a model does not say, which a small model may have no positions for.
    GenerationConfig(
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(256, n_positions // 2),
    ).save_pretrained(folder)
    tokenizer.model_max_length = n_positions
    # Not the token_type_ids that transformers' default adds: their embeddings would be added to the text's.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers has no kind of its own for a full disk
        raise OSError(one_line(error)) from error
