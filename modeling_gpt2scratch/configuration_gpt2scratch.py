"""GPT2Scratch model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class GPT2ScratchConfig(PreTrainedConfig):
    r"""
    Shape and hyperparameters of a GPT-2. Field names are those of stock GPT-2's `config.json`; the names that other
    models use (`hidden_size`, `num_hidden_layers`, ...) work as aliases. Defaults are GPT-2 124M, except the
    dropouts: 0.0, since pre-training sees each token about once.

    Args:
        vocab_size (`int`): number of tokens.
        n_positions (`int`): the longest sequence, in tokens; the positions are learned, so it is a hard limit.
        n_embd (`int`): width of the residual stream, a multiple of `n_head`.
        n_layer (`int`): number of transformer blocks.
        n_head (`int`): attention heads per block.
        n_inner (`int`, *optional*): width inside the feed-forward network; `4 * n_embd` if left out.
        activation_function (`str`): GPT-2 uses GELU in its tanh approximation, `"gelu_new"`.
        resid_pdrop, embd_pdrop, attn_pdrop (`float`): dropout after each residual branch, after the embeddings, and
            on the attention weights.
        layer_norm_epsilon (`float`): added to the variance in every LayerNorm.
        initializer_range (`float`): standard deviation of the initial weights. Projections into the residual stream
            get `initializer_range / sqrt(2 * n_layer)` (GPT-2 paper, section 2.3).
        qkv_bias (`bool`): whether query, key and value projections have a bias.
        tie_word_embeddings (`bool`): whether the output head shares the token embedding's weights.
        use_cache (`bool`): whether `generate` keeps keys and values of the tokens it has seen.

    Raises:
        ValueError: if `n_embd` is not a multiple of `n_head`, or a value is outside its range.
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
    qkv_bias: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` after construction: refuses shapes that no GPT-2 can have."""
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function {self.activation_function!r} is not one of transformers'.")
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")


__all__ = ["GPT2ScratchConfig"]
