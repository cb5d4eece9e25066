"""The causal mask of rows that may hold several documents, none of which sees another."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing


def causal_mask_of_packed_documents(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> tuple[torch.Tensor | None, dict]:
    """
    transformers' `create_causal_mask`, which keeps documents apart where `position_ids` start again, in the cases too
    that it leaves out in silence: next to an `attention_mask` or an empty cache, and with flash attention on more than
    one row. (Flash attention in a compiled graph, next to an `attention_mask`, is left as it is: a graph cannot look
    whether there are documents in the rows.)

    Args:
        attention_mask (`(B, past + T)`, *optional*): 1 for a token, 0 for padding. One of four dimensions is the
            caller's own business, and left as it is.
        position_ids (`(B, T)` or `(1, T)`, *optional*): as the caller gave them. A default made here would cost a
            compiled graph the `is_causal` kernel, since a graph cannot look at them.
        past_key_values: the cache that the caller gave. Once there is something in it, nothing is packed.

    Returns:
        The mask in the form of the attention implementation, and arguments for the attention besides.

    Raises:
        ValueError: for several documents in rows with padding under flash attention, which has no kernel for that.
    """
    if isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() == 0:
        past_key_values = None
    documents_apart = None
    attention_kwargs = {}
    if position_ids is not None and past_key_values is None:
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        is_flash = is_flash_attention_requested(config)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == position_ids.shape:
            starts = _starts_of_documents(position_ids, attention_mask.bool())
            if is_flash and not is_tracing(starts) and starts.any():
                if not attention_mask.all():
                    raise ValueError(
                        "Flash attention does not keep documents apart in rows with padding: use sdpa, or no padding."
                    )
                attention_mask = None  # which says the same
            elif is_tracing(starts) or starts.any():
                documents_apart = packed_sequence_mask_function(starts.cumsum(-1))
        if attention_mask is None and is_flash:
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


def _starts_of_documents(position_ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """(B, T): tokens whose position is not beyond that of the token before, of those that are no padding."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    last = torch.where(attended, index, -1).cummax(-1).values  # up to and with each token, -1 for none
    previous = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return attended & (previous >= 0) & (position_ids <= position_ids.gather(1, previous.clamp(min=0)))
