"""Published validation losses of GPT-2, to see one's own beside: of finished models, and of a 124M as it learns."""

import math
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pretraining.tokenization.tokenizer import tokenizer_fingerprint

# sha256 of its vocabulary and merges, see `tokenizer_fingerprint`.
GPT2_TOKENIZER = "791ec97af60dca33a46dd246e8bf7ef8687a4e7bac5fcf85ec49eac7fea9e624"

# Of OpenAI's GPT-2 in nats per token, by the name of the text.
VALIDATION_LOSSES = {
    "fineweb-edu": {"GPT-2 124M": 3.2924},  # sample-10BT; build-nanogpt, play.ipynb
    "fineweb": {  # llm.c, dev/vislog.ipynb
        "GPT-2 124M": 3.4250,
        "GPT-2 350M": 3.0831,
        "GPT-2 774M": 3.0006,
        "GPT-2 1558M": 2.8313,
    },
    "openwebtext": {  # nanoGPT, README, "baselines"
        "GPT-2 124M": 3.12,
        "GPT-2 350M": 2.84,
        "GPT-2 774M": 2.67,
        "GPT-2 1558M": 2.54,
    },
}


@dataclass(frozen=True)
class LossCurve:
    """
    The validation loss over the training of a model.

    Attributes:
        name: what was trained, and by which program.
        losses: optimizer steps, and nats per token.
    """

    name: str
    tokens_per_step: int
    losses: tuple[tuple[int, float], ...]

    def points(self, max_tokens: int) -> list[tuple[int, float]]:
        """Return (tokens, loss) of all points up to so many tokens."""
        return [
            (step * self.tokens_per_step, loss)
            for step, loss in self.losses
            if step * self.tokens_per_step <= max_tokens
        ]

    def loss_at(self, tokens: int) -> float:
        """Return the loss after so many tokens, straight in their logarithm between two points."""
        for (step, loss), (next_step, next_loss) in zip(self.losses, self.losses[1:], strict=False):
            if step * self.tokens_per_step <= tokens <= next_step * self.tokens_per_step:
                start, end = (math.log(max(1, each) * self.tokens_per_step) for each in (step, next_step))
                return loss + (next_loss - loss) * (math.log(tokens) - start) / (end - start)
        raise ValueError(f"the curve ends after {self.losses[-1][0] * self.tokens_per_step} tokens")


# Every 250 steps at first, later every 500 and 1,000.
CURVES = {
    # modded-nanogpt, records/track_1_short/2024-10-13_llmc/main.log: llm.c's recipe, on the first 10,485,760 tokens of
    # FineWeb's validation file.
    "fineweb": LossCurve(
        "124M by llm.c",
        524_288,
        (
            (0, 11.0092),
            (250, 6.1710),
            (500, 5.3743),
            (750, 4.7097),
            (1000, 4.3170),
            (1250, 4.1296),
            (1500, 4.0060),
            (1750, 3.9189),
            (2000, 3.8585),
            (2500, 3.7652),
            (3000, 3.6973),
            (3500, 3.6543),
            (4000, 3.6176),
            (4500, 3.5797),
            (5000, 3.5535),
            (5500, 3.5298),
            (6000, 3.5069),
            (7000, 3.4726),
            (8000, 3.4431),
            (9000, 3.4159),
            (10000, 3.3924),
            (11000, 3.3706),
            (12000, 3.3509),
            (13000, 3.3305),
            (14000, 3.3149),
            (15000, 3.3003),
            (16000, 3.2882),
            (17000, 3.2803),
            (18000, 3.2746),
            (19000, 3.2724),
            (19560, 3.2722),
        ),
    ),
    # csabapalfi/build-nanogpt, log/train-2x-h100-epoch-1.log at commit 059dd85: build-nanogpt's recipe, on two H100.
    "fineweb-edu": LossCurve(
        "124M by build-nanogpt",
        524_288,
        (
            (0, 10.9512),
            (250, 6.1760),
            (500, 5.2980),
            (750, 4.5767),
            (1000, 4.1544),
            (1250, 3.9544),
            (1500, 3.8140),
            (1750, 3.7272),
            (2000, 3.6690),
            (2500, 3.5744),
            (3000, 3.5023),
            (3500, 3.4572),
            (4000, 3.4153),
            (4500, 3.3845),
            (5000, 3.3528),
            (5500, 3.3416),
            (6000, 3.3106),
            (7000, 3.2689),
            (8000, 3.2380),
            (9000, 3.2161),
            (10000, 3.1896),
            (11000, 3.1689),
            (12000, 3.1479),
            (13000, 3.1327),
            (14000, 3.1188),
            (15000, 3.1072),
            (16000, 3.0963),
            (17000, 3.0897),
            (18000, 3.0820),
            (19000, 3.0743),
            (19072, 3.0717),
        ),
    ),
}


def comparable_losses(source_names: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """
    Return published validation losses of OpenAI's GPT-2 in nats per token, by model, on text of the same distribution;
    none if there are none, or the tokens are not GPT-2's.
    """
    return VALIDATION_LOSSES.get(_text_of(source_names, tokenizer), {})


def comparable_curve(source_names: list[str], tokenizer: PreTrainedTokenizerBase) -> LossCurve | None:
    """Return the published loss curve on text of the same distribution, None if there is none."""
    return CURVES.get(_text_of(source_names, tokenizer))


def _text_of(source_names: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return which of the published texts a run's only source is, as its name tells, "" if it is none."""
    if len(source_names) != 1 or tokenizer_fingerprint(tokenizer) != GPT2_TOKENIZER:
        return ""
    name = source_names[0].lower().rsplit("/", 1)[-1]
    # HuggingFaceFW/fineweb-edu, edufineweb_train_000001.npy; fineweb-edu-score-2 is another selection
    if re.search(r"edu_?fineweb|fineweb-edu(?!-score)", name):
        return "fineweb-edu"
    if re.search(r"fineweb(?![-_]?(2|edu))", name):  # kjj0/fineweb10B-gpt2; fineweb-2 is in other languages
        return "fineweb"
    return "openwebtext" if "openwebtext" in name else ""
