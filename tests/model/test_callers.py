"""What the ecosystem does to a causal language model works on this one, as on transformers' own GPT-2."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import random_ids, randomise, stock_model_with_the_weights_of, tiny_model
from transformers import DynamicCache, StaticCache


@pytest.fixture
def ours(request):
    """With three layers, or as many as a test asks for."""
    model = tiny_model(n_layer=getattr(request, "param", 3))
    randomise(model)
    return model


@pytest.fixture
def stock(ours):
    return stock_model_with_the_weights_of(ours, n_layer=ours.config.n_layer)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# Padding on the left and on the right, with the positions that generate() makes of it.
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def positions_of(mask):
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padded_batches(ours, stock, mask, attn_implementation):
    ids = random_ids(2, 8)
    arguments = {"attention_mask": mask, "position_ids": positions_of(mask)}
    ours.set_attn_implementation(attn_implementation)
    with torch.no_grad():
        logits, expected = ours(ids, **arguments).logits, stock(ids, **arguments).logits
        assert_close(logits[mask.bool()], expected[mask.bool()])
        alone = ours(ids[:1, mask[0].bool()]).logits
    assert_close(logits[0, mask[0].bool()], alone[0])


def test_positions_of_the_callers_own(ours, stock):
    ids, position_ids = random_ids(2, 8), torch.arange(9, 17).unsqueeze(0)
    assert_close(ours(ids, position_ids=position_ids).logits, stock(ids, position_ids=position_ids).logits)


def test_token_types_are_added_as_stock_adds_them(ours, stock):
    ids, types = random_ids(2, 8), random_ids(2, 8, seed=5)
    assert_close(ours(ids, token_type_ids=types).logits, stock(ids, token_type_ids=types).logits)
    embeddings = stock.transformer.wte(ids)
    by_embeddings = ours(inputs_embeds=embeddings, token_type_ids=types).logits
    assert_close(by_embeddings, stock(ids, token_type_ids=types).logits)
    assert (by_embeddings - ours(ids).logits).abs().max() > 0.1
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        ours.generate(ids, token_type_ids=types, **arguments), stock.generate(ids, token_type_ids=types, **arguments)
    )
    with pytest.raises(ValueError, match="Token id 101 is outside this model's vocabulary of 101"):
        ours(ids, token_type_ids=torch.full_like(ids, 101))


def test_embeddings_instead_of_ids(ours, stock):
    embeddings = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(0))
    assert_close(ours(inputs_embeds=embeddings).logits, stock(inputs_embeds=embeddings).logits)
    ids = random_ids(2, 8)
    assert_close(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, stock(ids).logits)


@pytest.mark.parametrize("training", [False, True])
def test_labels_that_do_not_count_and_a_count_of_the_whole_batch(ours, stock, training):
    ids = random_ids(2, 8)
    labels = ids.masked_fill(RIGHT == 0, -100)
    ours.train(training)
    for kwargs in ({}, {"num_items_in_batch": 30}):
        expected = stock(ids, attention_mask=RIGHT, labels=labels, **kwargs).loss
        loss = ours(ids, attention_mask=RIGHT, labels=labels, **kwargs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_logits_to_keep(ours, stock):
    ids = random_ids(2, 8)
    for kept in (1, 3, torch.tensor([0, 5])):
        assert_close(ours(ids, logits_to_keep=kept).logits, stock(ids, logits_to_keep=kept).logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_hidden_states_attentions_and_tuples(ours, stock, attn_implementation):
    ids = random_ids(2, 8)
    arguments = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    for model in (ours, stock):
        model.set_attn_implementation(attn_implementation)
    actual, expected = ours(ids, **arguments), stock(ids, **arguments)
    assert len(actual.hidden_states) == 4
    for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b)
    if attn_implementation == "eager":
        assert len(actual.attentions) == 3 and actual.attentions[0].shape == (2, 4, 8, 8)
        for a, b in zip(actual.attentions, expected.attentions, strict=True):
            assert_close(a, b)
    as_tuple = ours(ids, labels=ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple[0], stock(ids, labels=ids).loss)
    assert_close(as_tuple[1], expected.logits)


@pytest.mark.parametrize(
    "make_cache", [lambda config: DynamicCache(config=config), lambda config: StaticCache(config, 24)]
)
def test_caches_token_by_token(ours, stock, make_cache):
    ids = random_ids(2, 12)
    cache = make_cache(ours.config)
    with torch.no_grad():
        pieces = [
            ours(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([5, 1, 1, 5], dim=1)
        ]
        assert_close(torch.cat(pieces, dim=1), stock(ids).logits)


def generate(model, ids, mask, **arguments):
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=mask, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3, "num_return_sequences": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_generation_is_token_identical(ours, stock, arguments):
    ids = random_ids(2, 8)
    tokens = generate(ours, ids, LEFT, **arguments)
    assert tokens.shape[1] == 18
    assert torch.equal(tokens, generate(stock, ids, LEFT, **arguments))


def test_assisted_and_prompt_lookup_decoding_write_what_greedy_decoding_writes(ours, stock):
    ids = random_ids(1, 4).repeat(1, 2)
    mask = torch.ones_like(ids)
    expected = generate(ours, ids, mask)
    assistant = tiny_model(n_layer=1)
    assert torch.equal(generate(ours, ids, mask, assistant_model=assistant), expected)
    assert torch.equal(generate(ours, ids, mask, assistant_model=stock), expected)
    assert torch.equal(generate(ours, ids, mask, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("ours", [1], indirect=True, ids=["one layer"])  # each is compiled
def test_a_static_cache_and_a_compiled_graph_write_the_same(ours, stock):
    ids = random_ids(2, 8)
    expected = generate(stock, ids, LEFT)
    ours.forward = torch.compile(ours.forward, fullgraph=True)
    assert torch.equal(generate(ours, ids, LEFT, cache_implementation="static"), expected)


def test_the_whole_model_is_one_graph(ours):
    ids = random_ids(2, 8)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")  # the graph, without code made of it
    for arguments in ({}, {"attention_mask": LEFT, "position_ids": positions_of(LEFT)}):
        with torch.no_grad():
            kept = LEFT.bool()
            assert_close(compiled(ids, **arguments).logits[kept], ours(ids, **arguments).logits[kept])


def test_export_to_a_graph_of_any_batch_and_length(ours):
    ids = random_ids(2, 8)
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=24)}
    shapes = {"input_ids": dims, "use_cache": None}
    exported = torch.export.export(
        ours, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes, strict=False
    )
    longer = random_ids(3, 17)
    assert_close(exported.module()(input_ids=longer, use_cache=False).logits, ours(longer).logits)


def test_a_vocabulary_that_is_resized_keeps_its_tokens_and_its_tie(ours):
    ids = random_ids(2, 8)
    before = ours(ids).logits.detach()
    ours.resize_token_embeddings(130, pad_to_multiple_of=64)
    assert ours.config.vocab_size == 192
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_close(ours(ids).logits[..., :101], before)
    ours.train()
    ours(ids, labels=ids + 80).loss.backward()
    ours.eval().resize_token_embeddings(101)
    assert_close(ours(ids).logits, before)


def test_lora_trains_what_it_added_and_nothing_else(ours, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    ids = random_ids(2, 8)
    base = {name: weight.clone() for name, weight in ours.state_dict().items()}
    model = get_peft_model(ours, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        output = model(input_ids=ids, labels=ids)
        assert output.logits is None  # the loss without logits, through a head that is frozen
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    expected = model.eval()(ids).logits
    merged = model.merge_and_unload()
    assert_close(merged(ids).logits, expected)
    untouched = [name for name in base if not name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))]
    assert all(torch.equal(merged.state_dict()[name], base[name]) for name in untouched)
    fresh = tiny_model()
    randomise(fresh)
    fresh.load_adapter(str(tmp_path))
    assert_close(fresh(ids).logits, expected)


def test_lora_on_the_head_falls_back_to_logits(ours):
    model = get_peft_model(ours, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])).train()
    ids = random_ids(2, 8)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits is not None
    assert model.base_model.model.lm_head.lora_B["default"].weight.grad.abs().max() > 0
