"""Continuations as trees of tokens: the same log-likelihoods as one by one, of every model that sees them rightly."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_gpt2scratch  # noqa: F401  registers the model type
from pretraining.evaluation.loglikelihood import Continuation, TokenTree, score_continuations, takes_trees

VOCAB_SIZE, WINDOW = 50, 48


def random_model(
    model_type: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, **kwargs
):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    config = AutoConfig.for_model(model_type, **shape, **kwargs)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype).eval()


@pytest.fixture(scope="module")
def groups() -> list[list[Continuation]]:
    """Of different sizes; continuations that begin alike, that are the beginning of others, and that share nothing."""
    choose = random.Random(0)

    def tokens(count: int) -> list[int]:
        return choose.choices(range(VOCAB_SIZE), k=count)

    def behind(context: list[int], endings: list[list[int]]) -> list[Continuation]:
        return [Continuation(context + ending, len(ending)) for ending in endings]

    start = tokens(4)
    return [
        behind(tokens(9), [tokens(3), tokens(7), tokens(1), tokens(5)]),
        behind(tokens(2), [start + tokens(2), start, start + tokens(6), tokens(3)]),
        behind(tokens(30), [tokens(12), tokens(2)]),
        [Continuation(tokens(12), 11), Continuation(tokens(5), 2)],
        behind(tokens(20), [start, start, tokens(3), tokens(4)]),
    ]


def one_by_one(model, group: list[Continuation]) -> list[float]:
    sums = []
    for token_ids, num_scored in group:
        with torch.no_grad():
            logits = model(torch.tensor([token_ids[:-1]])).logits[0]
        log_probabilities = logits.double().log_softmax(dim=-1)
        places = range(len(token_ids) - num_scored, len(token_ids))
        sums.append(sum(log_probabilities[place - 1, token_ids[place]].item() for place in places))
    return sums


def loglikelihoods(model, groups: list[list[Continuation]], as_trees: bool) -> list[list[float]]:
    if not as_trees:
        return [[score_continuations(model, [[each]])[0][0].loglikelihood for each in group] for group in groups]
    return [[score.loglikelihood for score in scores] for scores in score_continuations(model, groups)]


MODELS = {
    "gpt2scratch, sdpa": ("gpt2scratch", {"n_positions": WINDOW, "attn_implementation": "sdpa"}),
    "gpt2scratch, eager": ("gpt2scratch", {"n_positions": WINDOW, "attn_implementation": "eager"}),
    "gpt2": ("gpt2", {"n_positions": WINDOW}),
    "gpt2, eager": ("gpt2", {"n_positions": WINDOW, "attn_implementation": "eager"}),
    "llama": ("llama", {"intermediate_size": 64}),  # rotary positions
    "gemma2": (  # caps its logits after the head, and has layers that see a window only
        "gemma2",
        {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 1.0},
    ),
    "mistral, short window": ("mistral", {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8}),
    "bloom": ("bloom", {}),  # distances by a bias, counted from the attention mask
    "mamba": ("mamba", {"state_size": 4}),  # recurrent
}
WITHOUT_TREES = ("mistral, short window", "bloom", "mamba")


@pytest.mark.parametrize("name", MODELS)
def test_the_log_likelihoods_are_those_of_each_continuation_by_itself(name, groups):
    model_type, kwargs = MODELS[name]
    model = random_model(model_type, **kwargs)
    longest = max(groups, key=lambda group: max(len(each.token_ids) for each in group))
    as_trees = takes_trees(model, [longest])
    assert as_trees == (name not in WITHOUT_TREES)
    expected = [one_by_one(model, group) for group in groups]
    for batch in (groups, groups[1:2]):
        found = loglikelihoods(model, batch, as_trees)
        assert len(found) == len(batch)
        for sums, group in zip(found, batch, strict=True):
            assert sums == pytest.approx(expected[groups.index(group)], abs=1e-4)
    if as_trees:
        assert loglikelihoods(model, groups, as_trees=False) == [pytest.approx(sums, abs=1e-4) for sums in expected]


def test_a_window_that_the_longest_item_fits_into_changes_nothing(groups):
    model = random_model("mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=WINDOW)
    assert takes_trees(model, groups)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_a_wrong_mask_is_found_out_in_16_bits_too(precision, groups):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # A layer's window counts what is before a token in the row, not in its sequence.
    model = random_model("gpt_neo", dtype, attention_types=[[["global", "local"], 1]], window_size=24)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert not takes_trees(model, groups)


def test_a_model_without_a_head_is_refused():
    model = random_model("gpt2scratch").model
    with pytest.raises(ValueError, match="a GPT2ScratchModel has no output embeddings"):
        takes_trees(model, [])


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_and_takes_trees_too(autocast, groups):
    expected = loglikelihoods(random_model("gpt2scratch", n_positions=WINDOW), groups, as_trees=True)
    model = random_model("gpt2scratch", torch.float32 if autocast else torch.bfloat16, n_positions=WINDOW)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert takes_trees(model, groups)
        found = loglikelihoods(model, groups, as_trees=True)
    assert found != expected
    assert found == [pytest.approx(sums, rel=0.02) for sums in expected]


def test_a_tree_has_every_beginning_once(groups):
    for group in groups:
        sequences = [each.token_ids for each in group]
        tree = TokenTree(sequences)
        beginnings = {tuple(tokens[:length]) for tokens in sequences for length in range(1, len(tokens) + 1)}
        assert len(tree) == len(tree.token_ids) == len(tree.depths) == len(beginnings)
        assert len(beginnings) < sum(map(len, sequences)) or group is groups[3]
        for tokens, path in zip(sequences, tree.paths, strict=True):
            assert [tree.token_ids[node] for node in path] == tokens
            assert [tree.depths[node] for node in path] == list(range(len(tokens)))


def test_nothing_is_computed_twice(groups):
    """The model gets a tree's nodes, its head what predicts something, each once."""
    model = random_model("gpt2scratch", n_positions=WINDOW)
    given, headed = [], []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: given.append(inputs[0].shape)),
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: headed.append(output.shape)),
    ]
    loglikelihoods(model, groups, as_trees=True)
    for hook in hooks:
        hook.remove()
    sizes, num_predictors = [], 0
    for group in groups:
        known = {each.token_ids[:length] for each in map(frozen, group) for length in range(1, len(each.token_ids))}
        sizes.append(len(known))
        num_predictors += len(
            {each.token_ids[:-left] for each in map(frozen, group) for left in range(1, each.num_scored + 1)}
        )
    assert given == [(len(groups), max(sizes))]
    assert headed == [(num_predictors, VOCAB_SIZE)]


def frozen(continuation: Continuation) -> Continuation:
    return continuation._replace(token_ids=tuple(continuation.token_ids))
