"""GPT-2 from torch primitives, at home in transformers.

Shapes in the comments: B batch, T tokens of this call, H heads, D width of a head, C = H * D the residual stream.
"""

import math
from copy import deepcopy
from dataclasses import fields
from os import PathLike
from threading import RLock
from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2scratch import GPT2ScratchConfig
from .document_mask import causal_mask_of_packed_documents
from .linear_cross_entropy import causal_lm_loss
from .one_dnn import fastest_linear

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
AUTO_MAP = {
    "AutoModel": "modeling_gpt2scratch.GPT2ScratchModel",
    "AutoModelForCausalLM": "modeling_gpt2scratch.GPT2ScratchForCausalLM",
}
# GPT-2's own spelling of the tanh approximation of GELU: the same formula, which torch has as one operation.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}
LOADING_LOCK = RLock()  # one model at a time, since transformers' register of weight names is the process's


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
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
        self.act_fn = ACT2FN[FUSED_ACTIVATIONS.get(config.activation_function, config.activation_function)]
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
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # causal masks in old stock checkpoints

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        | module                                        | weight                            | bias |
        |-----------------------------------------------|-----------------------------------|------|
        | `o_proj`, `down_proj` (into residual stream)  | N(0, initializer_range/sqrt(2 L)) | 0    |
        | other Linear                                  | N(0, initializer_range)           | 0    |
        | Embedding                                     | N(0, initializer_range)           |      |
        | LayerNorm                                     | 1                                 | 0    |

        With `zero_init_residual` the first line is 0, so that each block begins as the identity.
        The factor 1/sqrt(2 L) keeps the residual stream's variance from growing with the depth, there being two
        additions in each of the L blocks (GPT-2 paper, section 2.3).
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # A mark on the Linear: transformers never visits a module that has no parameters of its own, so asking
            # for the parent's class here would silently do nothing.
            if getattr(module, "is_residual_projection", False):
                std = 0.0 if self.config.zero_init_residual else std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As transformers', of this model's own checkpoints and of any stock GPT-2's."""
        # Registered for the time of loading only: transformers takes a map that stays for a model's own file format.
        with LOADING_LOCK:
            register_checkpoint_conversion_mapping(cls.config_class.model_type, FROM_STOCK_GPT2, overwrite=True)
            try:
                return super().from_pretrained(*args, **kwargs)
            finally:
                register_checkpoint_conversion_mapping(cls.config_class.model_type, [], overwrite=True)

    def save_pretrained(
        self, save_directory: str | PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """
        As transformers', in this model's own layout, with its code beside it.

        Args:
            save_original_format: write a stock GPT-2 instead, which `GPT2LMHeadModel`, and all that reads its
                checkpoints, loads without this code. (transformers' default is True; of a model that was loaded from a
                stock checkpoint, a resume that loads the weights by name would then start from random ones.)

        Raises:
            ValueError: for a stock GPT-2 of a model with adapters.
        """
        if not save_original_format:
            if self._auto_class is not None:  # transformers adds only the class that is saved
                self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
            return super().save_pretrained(save_directory, *args, save_original_format=False, **kwargs)
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"A stock GPT-2 has no place for adapters ({', '.join(self.peft_config)}): merge them first."
            )
        state_dict = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if state_dict is None else dict(state_dict)
        for name, weight in list(state_dict.items()):
            if not self.config.qkv_bias and name.endswith(tuple(f"{projection}.weight" for projection in QKV)):
                # Stock GPT-2 always has these biases.
                state_dict[name.removesuffix("weight") + "bias"] = weight.new_zeros(weight.shape[0])
        self._weight_conversions = deepcopy(FROM_STOCK_GPT2)
        state_dict = revert_weight_conversion(self, state_dict)
        shared = {field.name for field in fields(GPT2Config)} & {field.name for field in fields(self.config)}
        config = GPT2Config(**{name: getattr(self.config, name) for name in shared})
        with torch.device("meta"):
            stock = (GPT2LMHeadModel if self.can_generate() else GPT2Model)(config).to(self.dtype)
        if self.can_generate():
            stock.generation_config = self.generation_config
        return stock.save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


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
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`(B, T)`), or inputs_embeds (`(B, T, C)`): the new tokens.
            attention_mask (`(B, past + T)`, *optional*): 1 for a token, 0 for padding.
            position_ids (`(B, T)` or `(1, T)`, *optional*): counted on from the cache if left out. Where they start
                again within a row, a new document begins: it does not see those before it.
            past_key_values: keys and values of the tokens before these.
            token_type_ids (`(B, T)`, *optional*): ids of tokens whose embeddings are added, as stock GPT-2 adds them.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if the sequence is longer than
                `config.n_positions`, or (checked on a CPU only) an id is outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Pass exactly one of input_ids and inputs_embeds, got {given}.")
        if inputs_embeds is None:
            _check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)

        # The mask comes before the cache and before default positions, either of which would change how it is made.
        causal_mask, attention_kwargs = causal_mask_of_packed_documents(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._next_positions(inputs_embeds, past_key_values)
        else:
            self._check_positions(position_ids, past_key_values)

        hidden_states = inputs_embeds
        # A later stage of a pipeline, which has an Identity for each layer before its own, gets hidden states.
        if not isinstance(self.layers[0], nn.Identity):
            hidden_states = hidden_states + self.embed_positions(position_ids)
            if token_type_ids is not None:
                _check_token_ids(token_type_ids, self.config.vocab_size)
                hidden_states = hidden_states + self.embed_tokens(token_type_ids)
            hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **(attention_kwargs | kwargs),
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _next_positions(self, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        """Positions of the new tokens, (1, T): they go on where the cache ends."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = inputs_embeds.shape[1]
        # A static cache counts in a tensor: to compare it is to wait for a GPU, and breaks a compiled graph.
        if isinstance(past, int) or (past.device.type == "cpu" and not is_tracing(past)):
            self._check_length(int(past) + length)
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def _check_positions(self, position_ids: torch.Tensor, past_key_values: Cache | None) -> None:
        """On a GPU only where a cache says that text is generated: to look at the ids there is to wait for them."""
        if not is_tracing(position_ids) and (position_ids.device.type == "cpu" or past_key_values is not None):
            self._check_length(int(position_ids.max()) + 1)

    def _check_length(self, length: int) -> None:
        if length > self.config.n_positions:
            raise ValueError(
                f"A sequence of {length} tokens does not fit this model's {self.config.n_positions} positions "
                "(config.n_positions)."
            )


def in_function_transform() -> bool:
    """
    Return True within a transform of torch.func, or if torch does not tell. No public function does; a torch without
    the private one takes the plain paths everywhere.
    """
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return is_active is None or is_active()


def _check_token_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """On a CPU only: on a GPU, to look at the ids is to wait for them."""
    if ids.device.type != "cpu" or is_tracing(ids) or in_function_transform():
        return
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside) > 0:
        raise ValueError(
            f"Token id {int(outside[0])} is outside this model's vocabulary of {vocab_size} (config.vocab_size)."
        )


class GPT2ScratchForCausalLM(GPT2ScratchPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head, whose weights are the token embedding's unless untied."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

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
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args (beyond those of `GPT2ScratchModel`):
            labels (`(B, T)`, *optional*): the token ids themselves, shifted here; -100 is ignored.
            logits_to_keep: compute only the last so many logits (0: all), or those at these indices.
            skip_logits: with labels, return the loss alone (`logits` is None), which takes a tenth of the memory. Left
                out, it is so in a training step: in training mode, with gradients. (The name is Liger Kernel's.)
            num_items_in_batch: what to divide the summed loss by, when a batch is accumulated in parts. Without it
                the loss is the mean over this call's labels, in nats per token.
        """
        if labels is not None:
            ignored = labels == kwargs.get("ignore_index", -100)
            _check_token_ids(labels.masked_fill(ignored, 0), self.config.vocab_size)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None and self._skips_logits(skip_logits, logits_to_keep):
            loss = causal_lm_loss(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])  # (B, kept, vocabulary)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. On a CPU in fp32, with oneDNN's matrix products, which read the weights faster."""
        with fastest_linear(self.device):
            return super().generate(*args, **kwargs)

    def _skips_logits(self, skip_logits: bool | None, logits_to_keep: int | torch.Tensor) -> bool:
        """Whether to compute the loss without the logits, which takes the head's weight past the head's `forward`."""
        if skip_logits is None:
            skip_logits = self.training and torch.is_grad_enabled()
        head = self.lm_head
        return (
            skip_logits
            and isinstance(logits_to_keep, int)
            and logits_to_keep == 0
            and self.loss_function is ForCausalLMLoss
            and not in_function_transform()  # per-sample gradients and the like
            # Any other head than the plain one has to be called: one that is replaced (LoRA, quantisation), sharded
            # (FSDP, tensor parallelism), patched or hooked (offloading), or whose weight is elsewhere at the moment.
            and type(head) is nn.Linear
            and head.bias is None
            and type(head.weight) is nn.Parameter
            and head.weight.shape == (head.out_features, head.in_features)
            and head.weight.device.type != "meta"
            and "forward" not in head.__dict__
            and not (
                head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
            )
        )


class StockWeights(WeightConverter):
    """
    A converter after which weights can be quantised while they are loaded: each by itself, in a list, as a quantiser
    gets a weight that is not converted. transformers' own hands over the converted ones together, of which quantisers
    take the first and leave the others at random.
    """

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        weights = super().convert(layer_name, model, config, None, loading_info)
        if hf_quantizer is None or self.quantization_operation is None:
            return weights
        quantized = {}
        for name, weight in weights.items():
            if not hf_quantizer.param_needs_quantization(model, name):
                quantized[name] = weight
                continue
            quantized |= self.quantization_operation.convert(
                {name: [weight]},
                source_patterns=[name],
                target_patterns=[name],
                full_layer_name=name,
                config=config,
                model=model,
                missing_keys=loading_info.missing_keys if loading_info else None,
            )
        return quantized


# From the names and layouts of stock GPT-2 to those of this file, and, read backwards, the other way. Stock linear
# layers hold their weights transposed, and those of query, key and value in one.
FROM_STOCK_GPT2 = [
    WeightRenaming(r"(?<!\w)transformer\.", r"(?<!\w)model\."),
    WeightRenaming(r"(?<!\w)h\.", r"(?<!\w)layers\."),
    WeightRenaming(r"(?<!\w)wte\.", r"(?<!\w)embed_tokens\."),
    WeightRenaming(r"(?<!\w)wpe\.", r"(?<!\w)embed_positions\."),
    WeightRenaming(r"(?<!\w)ln_f\.", r"(?<!\w)norm\."),
    WeightRenaming("ln_1", "input_layernorm"),
    WeightRenaming("ln_2", "post_attention_layernorm"),
    WeightRenaming(r"(?<!\w)attn.c_proj.bias", "self_attn.o_proj.bias"),
    WeightRenaming("mlp.c_fc.bias", "mlp.up_proj.bias"),
    WeightRenaming("mlp.c_proj.bias", "mlp.down_proj.bias"),
    StockWeights(r"(?<!\w)attn.c_proj.weight", "self_attn.o_proj.weight", operations=[Transpose(0, 1)]),
    StockWeights("mlp.c_fc.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)]),
    StockWeights("mlp.c_proj.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)]),
    StockWeights(
        r"(?<!\w)attn.c_attn.weight", [f"{name}.weight" for name in QKV], operations=[Transpose(0, 1), Chunk(0)]
    ),
    StockWeights(r"(?<!\w)attn.c_attn.bias", [f"{name}.bias" for name in QKV], operations=[Chunk(0)]),
]

__all__ = ["GPT2ScratchForCausalLM", "GPT2ScratchModel", "GPT2ScratchPreTrainedModel"]
