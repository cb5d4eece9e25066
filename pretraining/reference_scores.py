"""What OpenAI's models reach, as lines in the plots. Figures that others published; their sources beside them."""

from transformers import PreTrainedTokenizerBase

from pretraining.tokenizer import tokenizer_fingerprint

# sha256 of its vocabulary and merges, see `tokenizer_fingerprint`.
GPT2_TOKENIZER = "791ec97af60dca33a46dd246e8bf7ef8687a4e7bac5fcf85ec49eac7fea9e624"

# Of OpenAI's GPT-2 in nats per token, by a part of the dataset's name.
VALIDATION_LOSSES = {
    "fineweb-edu": {"GPT-2 124M": 3.2924},  # sample-10BT; build-nanogpt, play.ipynb
    "openwebtext": {  # nanoGPT, README, "baselines"
        "GPT-2 124M": 3.12,
        "GPT-2 350M": 2.84,
        "GPT-2 774M": 2.67,
        "GPT-2 1558M": 2.54,
    },
}

# acc_norm of the completion protocol, in percent of all 10,042 items.
HELLASWAG_ACC_NORM = {
    "GPT-2 124M": 29.55,  # build-nanogpt, hellaswag.py
    "GPT-2 350M": 37.52,  # llm.c, dev/vislog.ipynb
    "GPT-2 774M": 43.20,  # llm.c, dev/vislog.ipynb
    "GPT-2 1558M": 48.93,  # build-nanogpt, hellaswag.py
    "GPT-3 124M": 33.70,  # this and the others: llm.c, dev/vislog.ipynb, after Brown et al. 2020
    "GPT-3 350M": 43.60,
    "GPT-3 760M": 51.00,
    "GPT-3 1.3B": 54.70,
}


def comparable_losses(source_names: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """
    Published validation losses of OpenAI's GPT-2 in nats per token, by model, on text of the same distribution; empty
    if there are none, or the tokens are not GPT-2's.
    """
    if len(source_names) != 1 or tokenizer_fingerprint(tokenizer) != GPT2_TOKENIZER:
        return {}
    name = source_names[0].lower()
    return next((losses for key, losses in VALIDATION_LOSSES.items() if key in name), {})
