"""The causal mask of rows that may hold several documents, none of which sees another."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested


def causal_mask_of_packed_documents(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> tuple[torch.Tensor | None, dict]:
    """
    transformers' `create_causal_mask`, which keeps documents apart where `position_ids` start again, in the cases too
    that it leaves out in silence: next to an `attention_mask`, and with flash attention on more than one row. (With
    flash attention and an `attention_mask` at once, documents are not kept apart.)

    Args:
        attention_mask (`(B, past + T)`, *optional*): 1 for a token, 0 for padding.
        position_ids (`(B, T)` or `(1, T)`, *optional*): as the caller gave them. A default made here would cost a
            compiled graph the `is_causal` kernel, since a graph cannot look at them.
        past_key_values: the cache that the caller gave. With one, text is generated, and nothing is packed.

    Returns:
        The mask in the form of the attention implementation, and arguments for the attention besides.
    """
    documents_apart = None
    attention_kwargs = {}
    if position_ids is not None and past_key_values is None:
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        if attention_mask is not None and attention_mask.ndim == 2:
            documents = find_packed_sequence_indices(position_ids)
            documents_apart = None if documents is None else packed_sequence_mask_function(documents)
        elif attention_mask is None and is_flash_attention_requested(config):
            lengths, longest = prepare_fa_kwargs_from_position_ids(position_ids)
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            attention_kwargs = dict(zip(names, (*lengths, *longest), strict=True))
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=documents_apart,
    )
    return mask, attention_kwargs
