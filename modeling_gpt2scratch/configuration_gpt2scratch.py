"""GPT2Scratch model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# n_layer, n_head, n_embd of the published sizes (GPT-2 paper, table 2), named by the released weights' parameters.
PRESETS = {"124M": (12, 12, 768), "350M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
UNSUPPORTED = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")  # of stock GPT-2


@strict
class GPT2ScratchConfig(PreTrainedConfig):
    r"""
    Shape and hyperparameters of a GPT-2. Field names are those of stock GPT-2's `config.json`, which can be read as it
    is; the names that other models use (`hidden_size`, `num_hidden_layers`, ...) work as aliases. Defaults are GPT-2
    124M, except the dropouts: 0.0, since pre-training sees each token about once.

    Args:
        vocab_size (`int`): number of tokens.
        n_positions (`int`): the longest sequence, in tokens; the positions are learned, so it is a hard limit.
        n_embd (`int`): width of the residual stream, a multiple of `n_head`.
        n_layer, n_head (`int`): number of transformer blocks, and of attention heads in each.
        n_inner (`int`, *optional*): width inside the feed-forward network; `4 * n_embd` if left out.
        activation_function (`str`): GPT-2 uses GELU in its tanh approximation, `"gelu_new"`.
        resid_pdrop, embd_pdrop, attn_pdrop (`float`): dropout of residual branches, embeddings and attention weights.
        layer_norm_epsilon (`float`): added to the variance in every LayerNorm.
        initializer_range (`float`): standard deviation of the initial weights; smaller into the residual stream.
        zero_init_residual (`bool`): whether the projections into the residual stream begin as zeros.
        qkv_bias (`bool`): whether query, key and value projections have a bias.
        tie_word_embeddings (`bool`): whether the output head shares the token embedding's weights.
        use_cache (`bool`): whether `generate` keeps keys and values of the tokens it has seen.

    Raises:
        ValueError: for a value outside its range, or an option of stock GPT-2 that this model lacks.
    """

    model_type = "gpt2scratch"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    base_model_tp_plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["position_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    zero_init_residual: bool = False
    qkv_bias: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "GPT2ScratchConfig":
        """The config of a published size, one of `PRESETS`, with `changes` to it."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return cls(**{**dict(zip(("n_layer", "n_head", "n_embd"), PRESETS[name], strict=True)), **changes})

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As transformers', but the config of a stock GPT-2 is one of this model."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "gpt2":
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        # Not kept: under another type than its own, a model's weights would not be converted but stay random.
        if (model_type := kwargs.pop("model_type", "gpt2")) not in ("gpt2", self.model_type):
            raise ValueError(f"This is the config of a {model_type} model, not of a GPT-2.")
        self.n_inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        super().__post_init__(**kwargs)
        self.validate_architecture()  # `@strict` calls it too, but wraps the ValueError in an error of its own

    def validate_architecture(self) -> None:
        """Refuses shapes that no GPT-2 can have, and options of stock GPT-2 that would be ignored in silence."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function {self.activation_function!r} is not one of transformers'.")
        for name, value in {"scale_attn_weights": True, **dict.fromkeys(UNSUPPORTED, False)}.items():
            if getattr(self, name, value) != value:
                raise ValueError(f"{name}={getattr(self, name)} is not supported by this model, only {name}={value}.")


__all__ = ["GPT2ScratchConfig"]
