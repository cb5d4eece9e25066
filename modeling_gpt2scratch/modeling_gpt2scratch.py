"""GPT-2 from torch primitives, at home in transformers.

Shapes in the comments: B batch, T tokens of this call, H heads, D width of a head, C = H * D the residual stream.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2scratch import GPT2ScratchConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T / sqrt(D)) V, written out; the other implementations come from transformers."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)  # (B, H, T, D)
    return output.transpose(1, 2), weights  # (B, T, H, D)


class GPT2ScratchAttention(nn.Module):
    """Causal multi-head self-attention. (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd)
        self.o_proj.is_residual_projection = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, D)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attn_pdrop if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*input_shape, -1).contiguous()  # (B, T, H, D) -> (B, T, C)
        return self.o_proj(output), weights


class GPT2ScratchMLP(nn.Module):
    """The position-wise feed-forward network. (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPT2ScratchConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.n_inner)
        self.act_fn = ACT2FN[config.activation_function]
        self.down_proj = nn.Linear(config.n_inner, config.n_embd)
        self.down_proj.is_residual_projection = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPT2ScratchDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.self_attn = GPT2ScratchAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ScratchMLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attention_output)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(mlp_output)


class GPT2ScratchPreTrainedModel(PreTrainedModel):
    config: GPT2ScratchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ScratchDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ScratchDecoderLayer, "attentions": GPT2ScratchAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        | module                                        | weight                            | bias |
        |-----------------------------------------------|-----------------------------------|------|
        | `o_proj`, `down_proj` (into residual stream)  | N(0, initializer_range/sqrt(2 L)) | 0    |
        | other Linear                                  | N(0, initializer_range)           | 0    |
        | Embedding                                     | N(0, initializer_range)           |      |
        | LayerNorm                                     | 1                                 | 0    |

        The factor 1/sqrt(2 L) keeps the residual stream's variance from growing with the depth, there being two
        additions in each of the L blocks (GPT-2 paper, section 2.3).
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # A mark on the Linear: transformers never visits a module that has no parameters of its own, so asking
            # for the parent's class here would silently do nothing.
            if getattr(module, "is_residual_projection", False):
                std = std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GPT2ScratchModel(GPT2ScratchPreTrainedModel):
    """Embeddings, `n_layer` blocks and the last LayerNorm: token ids to hidden states, without a head."""

    def __init__(self, config: GPT2ScratchConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(GPT2ScratchDecoderLayer(config, idx) for idx in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`(B, T)`), or inputs_embeds (`(B, T, C)`): the new tokens.
            attention_mask (`(B, past + T)`, *optional*): 1 for a token, 0 for padding.
            position_ids (`(B, T)` or `(1, T)`, *optional*): counted on from the cache if left out.
            past_key_values: keys and values of the tokens before these.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or if the sequence is longer
                than `config.n_positions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Pass exactly one of input_ids and inputs_embeds, got {given}.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # Before position_ids get their default: with them set, the mask function looks for packed documents in them
        # and a compiled graph falls back from `is_causal` to a dense mask.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self._next_positions(inputs_embeds, past_key_values)
        else:
            self._check_positions(position_ids, past_key_values)

        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _next_positions(self, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        """Positions of the new tokens, (1, T): they go on where the cache ends."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = inputs_embeds.shape[1]
        # A static cache counts in a tensor; comparing it would force a synchronisation, and break a compiled graph.
        if isinstance(past, int) and past + length > self.config.n_positions:
            raise ValueError(
                f"A sequence of {past + length} tokens does not fit this model's {self.config.n_positions} positions "
                "(config.n_positions)."
            )
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def _check_positions(self, position_ids: torch.Tensor, past_key_values: Cache | None) -> None:
        """On a GPU only where a cache says that text is generated: to look at the ids there is to wait for them."""
        if torch.compiler.is_compiling() or (position_ids.is_cuda and past_key_values is None):
            return
        last = int(position_ids.max())
        if last >= self.config.n_positions:
            raise ValueError(
                f"A sequence of {last + 1} tokens does not fit this model's {self.config.n_positions} positions "
                "(config.n_positions)."
            )


class GPT2ScratchForCausalLM(GPT2ScratchPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head, whose weights are the token embedding's unless untied."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GPT2ScratchConfig):
        super().__init__(config)
        self.model = GPT2ScratchModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args (beyond those of `GPT2ScratchModel`):
            labels (`(B, T)`, *optional*): the token ids themselves, shifted here; -100 is ignored.
            logits_to_keep: compute only the last so many logits (0: all), or those at these indices.
            num_items_in_batch: what to divide the summed loss by, when a batch is accumulated in parts. Without it
                the loss is the mean over this call's labels, in nats per token.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, kept, vocabulary)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["GPT2ScratchForCausalLM", "GPT2ScratchModel", "GPT2ScratchPreTrainedModel"]
