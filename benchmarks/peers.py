"""Peers of the benchmarks that cannot be installed: transcriptions of the method, not the code."""

import torch
from torch import nn
from torch.nn import functional


class NanoGPT(nn.Module):
    """
    nanoGPT's model as its train.py makes it: no biases, no dropout, exact GELU, query, key and value in one product,
    torch's attention, a vocabulary that is a multiple of 64, and the logits of all tokens in the loss.
    """

    def __init__(self, n_layer: int, n_embd: int, n_head: int, n_positions: int, vocab_size: int):
        super().__init__()
        vocab_size = -(-vocab_size // 64) * 64
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(n_positions, n_embd)
        self.blocks = nn.ModuleList(NanoGPTBlock(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_last = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * n_layer) ** 0.5 if is_last else 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


class NanoGPTBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.attention_in = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.attention_out = nn.Linear(n_embd, n_embd, bias=False)
        self.mlp_in, self.mlp_out = (
            nn.Linear(n_embd, 4 * n_embd, bias=False),
            nn.Linear(4 * n_embd, n_embd, bias=False),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        parts = self.attention_in(self.norm_1(hidden)).split(width, dim=2)
        query, key, value = (part.view(batch, length, self.n_head, -1).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp_out(functional.gelu(self.mlp_in(self.norm_2(hidden))))
