"""Documents in one row, told apart by positions that start again, are as if each were alone."""

from itertools import product

import pytest
import torch
from support.tiny_models import random_ids, randomise, stock_model_with_the_weights_of, tiny_model
from transformers import DynamicCache

from pretraining.kernels.tiled_attention import TILED

LENGTHS = [(5, 1, 7, 3), (16,)]  # of the documents in two rows of 16 tokens


def packed_batch():
    ids = random_ids(2, 16)
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return ids, position_ids


def one_at_a_time(model, ids):
    """(2, 16, vocabulary): each document in a batch of its own."""
    rows = [
        torch.cat([model(document.unsqueeze(0)).logits for document in row.split(list(lengths))], dim=1)
        for row, lengths in zip(ids, LENGTHS, strict=True)
    ]
    return torch.cat(rows)


def packed_model(**changes):
    model = tiny_model(**changes)
    randomise(model)
    return model


# flex_attention is compiled anew for each case: two of the four do.
@pytest.mark.parametrize(
    ("attn_implementation", "use_cache", "masked"),
    [(name, *case) for name in ("eager", "sdpa", TILED) for case in product((True, False), repeat=2)]
    + [("flex_attention", True, False), ("flex_attention", False, True)],
)
def test_no_document_sees_another(attn_implementation, use_cache, masked):
    model = packed_model(use_cache=use_cache)
    ids, position_ids = packed_batch()
    attention_mask = torch.ones_like(ids) if masked else None
    with torch.no_grad():
        expected = one_at_a_time(model, ids)
        leaking = model(ids, attention_mask=attention_mask).logits
        model.set_attn_implementation(attn_implementation)
        logits = model(ids, position_ids=position_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert (leaking - expected)[0, 5:].abs().max() > 0.1  # the documents before them would matter


def test_in_training_as_in_evaluation():
    """Loss and gradients of packed rows are those of the documents alone, weighted by their tokens."""
    model = packed_model().train()
    ids, position_ids = packed_batch()
    labels = ids.clone()
    labels[position_ids == 0] = -100  # the first token of a document is not predicted from the one before it
    loss = model(ids, position_ids=position_ids, labels=labels).loss
    loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    count = int((labels != -100).sum())
    alone = 0
    for row, lengths in zip(ids, LENGTHS, strict=True):
        for document in row.split(list(lengths)):
            if len(document) > 1:
                document = document.unsqueeze(0)
                alone = alone + model(document, labels=document, num_items_in_batch=count).loss
    alone.backward()
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_in_a_compiled_graph_with_gradient_checkpointing():
    model = packed_model(n_layer=1).train()
    ids, position_ids = packed_batch()
    expected = one_at_a_time(model, ids)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graph, without code made of it
    for attention_mask in (None, torch.ones(2, 16, dtype=torch.long)):
        output = compiled(input_ids=ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=2e-5)


def test_padding_next_to_packed_documents():
    """A shorter row, padded on the left or on the right: its documents are the same, and no padding is seen."""
    model = packed_model()
    ids, position_ids = packed_batch()
    expected = one_at_a_time(model, ids)[:1]
    for padding in ((3, 0), (0, 3)):
        padded_ids, padded_positions = (torch.nn.functional.pad(x[:1], padding) for x in (ids, position_ids))
        mask = torch.nn.functional.pad(torch.ones(1, 16, dtype=torch.long), padding)
        logits = model(padded_ids, position_ids=padded_positions, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()].unsqueeze(0), expected, rtol=0, atol=2e-5)


def test_next_to_a_cache_that_is_still_empty():
    model = packed_model()
    ids, position_ids = packed_batch()
    cache = DynamicCache(config=model.config)
    logits = model(ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, one_at_a_time(model, ids), rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("in_the_gap", [0, 2, 23])
def test_a_gap_in_the_mask_or_in_the_positions_begins_no_document(in_the_gap):
    """A right-padded prompt and its completion, whose positions go on behind the gap; whatever stands in the gap."""
    model = packed_model()
    ids = random_ids(1, 10)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1, 1, 1]])
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, in_the_gap)
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    kept = mask[0].bool()
    torch.testing.assert_close(logits[:, kept], model(ids[:, kept]).logits, rtol=0, atol=2e-5)
    stock = stock_model_with_the_weights_of(model)
    jump = torch.tensor([[0, 1, 2, 3, 4, 9, 10, 11, 12, 20]])
    ones = torch.ones_like(ids)
    expected = stock(ids, attention_mask=ones, position_ids=jump).logits
    torch.testing.assert_close(model(ids, attention_mask=ones, position_ids=jump).logits, expected, rtol=0, atol=2e-5)


def test_where_nothing_is_packed_no_mask_is_made():
    """So that sdpa takes its causal kernel."""
    masks = []

    def remember(module, arguments, keywords):
        masks.append(keywords["attention_mask"])

    model = packed_model()
    model.model.layers[0].self_attn.register_forward_pre_hook(remember, with_kwargs=True)
    ids = random_ids(2, 16)
    positions = torch.arange(16).unsqueeze(0)
    model(ids)
    model(ids, position_ids=positions)
    model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    assert masks == [None, None, None]


def test_flash_attention_is_told_where_the_documents_of_all_rows_begin(monkeypatch):
    """Flash attention itself needs a GPU; what it would be called with does not."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def flash_attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, kwargs))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_attention)
    model = packed_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    ids, position_ids = packed_batch()
    ones = torch.ones_like(ids)
    for mask in (None, ones):
        calls.clear()
        model(ids, position_ids=position_ids, attention_mask=mask)
        mask, kwargs = calls[0]
        assert mask is None
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert kwargs[name].tolist() == [0, 5, 6, 13, 16, 32]
            assert kwargs[name].dtype == torch.int32
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == 16
    calls.clear()
    model(ids)
    assert "cu_seq_lens_q" not in calls[0][1]
    padding = ones.index_fill(1, torch.tensor([0]), 0)
    calls.clear()
    model(ids, attention_mask=padding, position_ids=(padding.cumsum(-1) - 1).clamp(min=0))  # a document a row
    mask, kwargs = calls[0]
    assert torch.equal(mask, padding) and "cu_seq_lens_q" not in kwargs
    with pytest.raises(ValueError, match="does not keep documents apart in rows with padding"):
        model(ids, attention_mask=padding, position_ids=position_ids)
