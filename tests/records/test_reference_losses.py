"""Published losses beside one's own: of the same text and tokenizer alone, and as the documentation says them."""

import json
import re

import pytest
from conftest import REPOSITORY

from pretraining.records import reference_losses
from pretraining.records.plots import plot_loss
from pretraining.records.reference_losses import CURVES, comparable_curve, comparable_losses
from pretraining.tokenization.tokenizer import tokenizer_fingerprint, train_tokenizer


@pytest.fixture
def tokenizer(monkeypatch):
    """One that counts as GPT-2's."""
    tokenizer = train_tokenizer(["some text " * 100], 300)
    monkeypatch.setattr(reference_losses, "GPT2_TOKENIZER", tokenizer_fingerprint(tokenizer))
    return tokenizer


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HuggingFaceFW/fineweb-edu", "fineweb-edu"),
        ("10 files, edufineweb_train_000001.npy and on", "fineweb-edu"),
        ("HuggingFaceFW/fineweb", "fineweb"),
        ("kjj0/fineweb10B-gpt2", "fineweb"),
        ("Skylion007/openwebtext", "openwebtext"),
        ("roneneldan/TinyStories", None),
        ("HuggingFaceFW/fineweb-2", None),
        ("HuggingFaceFW/fineweb-edu-score-2", None),
        ("educators/fineweb10B", "fineweb"),
    ],
)
def test_a_text_has_its_own_figures_and_no_others(name, text, tokenizer):
    assert comparable_losses([name], tokenizer) == reference_losses.VALIDATION_LOSSES.get(text, {})
    assert comparable_curve([name], tokenizer) is CURVES.get(text)
    assert comparable_curve([name, name], tokenizer) is None  # a mixture is another text


def test_losses_of_other_tokens_are_not_compared():
    tokenizer = train_tokenizer(["some text " * 100], 300)
    assert comparable_curve(["fineweb"], tokenizer) is None
    assert comparable_losses(["fineweb"], tokenizer) == {}


def test_a_curve_goes_through_its_points_and_ends_where_ones_own_does():
    curve = CURVES["fineweb"]
    assert curve.loss_at(1000 * 524_288) == pytest.approx(4.3170) and curve.loss_at(19_560 * 524_288) == 3.2722
    assert 4.1296 < curve.loss_at(1125 * 524_288) < 4.3170
    assert curve.points(600 * 524_288) == [(0, 11.0092), (250 * 524_288, 6.1710), (500 * 524_288, 5.3743)]
    with pytest.raises(ValueError, match="the curve ends after"):
        curve.loss_at(10**11)
    for curve in CURVES.values():
        losses = [loss for _, loss in curve.losses]
        assert losses == sorted(losses, reverse=True)


def test_the_published_curve_is_in_the_picture(tmp_path):
    pictures = {}
    for name, curve in (("with", CURVES["fineweb"]), ("without", None)):
        folder = tmp_path / name
        folder.mkdir()
        tokens = [step * 524_288 for step in range(100, 3000, 100)]
        lines = [{"step": 1, "tokens": each, "elapsed_seconds": 1.0, "eval_loss": 4.0} for each in tokens]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_loss(folder, {}, curve)
        pictures[name] = (folder / "plots/loss.png").read_bytes()
    assert pictures["with"] != pictures["without"]


def test_the_table_of_the_documentation_is_that_of_the_curves():
    text = (REPOSITORY / "docs/training.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) (million|billion) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    units = {"million": 10**6, "billion": 10**9}
    assert [int(number) * units[unit] for number, unit, *_ in rows] == [10**8, 3 * 10**8, 10**9, 3 * 10**9, 10**10]
    for number, unit, *losses in rows:
        tokens = int(number) * units[unit]
        for loss, curve in zip(losses, (CURVES["fineweb"], CURVES["fineweb-edu"]), strict=True):
            expected = curve.loss_at(min(tokens, curve.losses[-1][0] * curve.tokens_per_step))
            assert float(loss) == pytest.approx(expected, abs=0.006)
