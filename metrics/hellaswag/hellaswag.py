"""HellaSwag's two accuracies and their standard errors, from the log-likelihoods of the endings."""

import math

import datasets
import evaluate

_CITATION = """\
@inproceedings{zellers2019hellaswag,
    title = {HellaSwag: Can a Machine Really Finish Your Sentence?},
    author = {Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle = {Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year = {2019}
}
"""

_DESCRIPTION = """\
A language model takes the ending of an item that it finds likeliest: as a whole for `acc`, by token or by character
for `acc_norm`.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each item, the summed log-likelihood of each of its endings, in nats.
    lengths: for each item, what the log-likelihoods are divided by for `acc_norm`: the number of tokens of each
        ending, or of its characters.
    references: for each item, the index of the true ending.

Returns:
    acc, acc_norm: fractions of the items. Of equal endings the first one is taken.
    acc_stderr, acc_norm_stderr: standard errors of these means over the items, or None for a single item.

Examples:
    >>> hellaswag = evaluate.load("metrics/hellaswag")
    >>> hellaswag.compute(
    ...     predictions=[[-9.0, -8.0, -30.0, -31.0], [-20.0, -21.0, -22.0, -5.0]],
    ...     lengths=[[6, 2, 10, 10], [10, 10, 10, 10]],
    ...     references=[0, 3],
    ... )
    {'acc': 0.5, 'acc_stderr': 0.5, 'acc_norm': 1.0, 'acc_norm_stderr': 0.0}
"""


class HellaSwag(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "lengths": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1905.07830"],
        )

    def _compute(
        self, predictions: list[list[float]], lengths: list[list[int]], references: list[int]
    ) -> dict[str, float | None]:
        """
        Raises:
            ValueError: for an item without a number and a length above 0 for each ending, or a reference to none.
        """
        hits, hits_norm = [], []
        for index, (sums, divisors, label) in enumerate(zip(predictions, lengths, references, strict=True)):
            if not (len(sums) == len(divisors) > label >= 0 and all(map(math.isfinite, sums)) and min(divisors) > 0):
                raise ValueError(
                    f"item {index}: log-likelihoods {sums} and lengths {divisors} of its endings, of which {label} is "
                    "the true one, do not go together"
                )
            means = [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
            hits.append(sums.index(max(sums)) == label)
            hits_norm.append(means.index(max(means)) == label)
        return {
            "acc": _mean(hits),
            "acc_stderr": _standard_error(hits),
            "acc_norm": _mean(hits_norm),
            "acc_norm_stderr": _standard_error(hits_norm),
        }


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def _standard_error(values: list[bool]) -> float | None:
    """Standard deviation of the sample, which for hits and misses is this, over the square root of its size."""
    p, n = _mean(values), len(values)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
