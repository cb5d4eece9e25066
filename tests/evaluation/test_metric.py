"""The metric in metrics/hellaswag: its figures, and its way to the Hub and back."""

import json
import re
import statistics
import sys

import evaluate
import pytest
from conftest import REPOSITORY, run, succeed
from huggingface_hub import RepoCard
from support.hub_server import Hub

FOLDER = REPOSITORY / "metrics" / "hellaswag"


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def test_means_and_their_standard_errors(metric):
    """The first ending is right; of ten items four are found by the sum, and three by the mean."""
    by_the_sum, by_neither, by_both, by_the_mean = (
        ([-4.0, -6.0], [1, 10]),
        ([-6.0, -4.0], [1, 1]),
        ([-4.0, -6.0], [1, 1]),
        ([-6.0, -4.0], [10, 1]),
    )
    items = [by_the_sum] * 3 + [by_neither] * 4 + [by_both] + [by_the_mean] * 2
    sums, lengths = zip(*items, strict=True)
    found = metric.compute(predictions=sums, lengths=lengths, references=[0] * 10)
    assert found == {
        "acc": pytest.approx(0.4),
        "acc_stderr": pytest.approx(statistics.stdev([1] * 4 + [0] * 6) / 10**0.5),
        "acc_norm": pytest.approx(0.3),
        "acc_norm_stderr": pytest.approx(statistics.stdev([1] * 3 + [0] * 7) / 10**0.5),
    }


def test_of_equal_endings_the_first_is_taken_and_one_item_has_no_standard_error(metric):
    found = metric.compute(predictions=[[-2.0, -1.0, -1.0]], lengths=[[2, 1, 1]], references=[1])
    assert found == {"acc": 1.0, "acc_stderr": None, "acc_norm": 0.0, "acc_norm_stderr": None}


@pytest.mark.parametrize(
    "sums, lengths, label",
    [
        ([-1.0, float("nan")], [1, 1], 0),
        ([-1.0, float("-inf")], [1, 1], 0),
        ([-1.0, -2.0], [1, 0], 0),
        ([-1.0, -2.0], [1], 0),
        ([-1.0, -2.0], [1, 1], 2),
        ([-1.0, -2.0], [1, 1], -1),
    ],
)
def test_an_item_that_makes_no_sense_is_refused_with_its_index(metric, sums, lengths, label):
    fine = ([-1.0, -2.0], [1, 1], 0)
    both = zip(fine, (sums, lengths, label), strict=True)
    with pytest.raises(ValueError, match="item 1: log-likelihoods"):
        metric.compute(**dict(zip(("predictions", "lengths", "references"), map(list, both), strict=True)))


def test_the_examples_of_its_page_and_of_its_help_are_true(metric, monkeypatch):
    (code,) = re.findall("```python\n(.+?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    *_, expected = code.strip().splitlines()
    call = code[code.index("hellaswag.compute(") :]
    assert eval(call, {"hellaswag": metric}) == eval(expected.removeprefix("# "))
    in_help = metric.inputs_description.replace(">>> ", "").replace("... ", "")
    assert re.sub(r"\s+", "", call.split("\n#")[0]) in re.sub(r"\s+", "", in_help)
    assert expected.removeprefix("# ") in in_help


def test_published_as_it_is_it_is_loaded_by_its_name(tmp_path):
    code = """
import json, sys
import evaluate
from huggingface_hub import HfApi

HfApi().create_repo("us/hellaswag", repo_type="space", space_sdk="gradio")
HfApi().upload_folder(folder_path=sys.argv[1], repo_id="us/hellaswag", repo_type="space")
metric = evaluate.load("us/hellaswag")
print(json.dumps(metric.compute(predictions=[[-2.0, -1.0]] * 2, lengths=[[4, 1]] * 2, references=[0, 1])))
"""
    with Hub(token="secret") as hub:
        result = succeed(run(sys.executable, "-c", code, FOLDER, **hub.environment(tmp_path / "me")))
        assert set(hub.files("us/hellaswag", "space")) == {"README.md", "app.py", "hellaswag.py", "requirements.txt"}
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"acc": 0.5, "acc_stderr": 0.5, "acc_norm": 0.5, "acc_norm_stderr": 0.5}


def test_its_card_says_what_a_space_needs():
    data = RepoCard.load(FOLDER / "README.md").data
    assert (data.sdk, data.app_file) == ("gradio", "app.py") and (FOLDER / data.app_file).is_file()
    assert set(data.tags) == {"evaluate", "metric"}
