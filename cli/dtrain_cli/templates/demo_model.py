"""A small decoder-only transformer over bytes, about 260,000 parameters."""

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT = 128


class Block(nn.Module):
    """Attention to what came before, then a perceptron; both add to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, position, width]."""
        samples, length, width = x.shape
        split = (samples, length, self.heads, width // self.heads)
        query, key, value = (t.view(split).transpose(1, 2) for t in self.attend(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(samples, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes -> logits of the next byte at every position. The embedding is also the output layer."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, position, 256] for int64[sample, position]."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


def build(width: int = 96, depth: int = 2, heads: int = 4) -> nn.Module:
    """Return the module."""
    return LanguageModel(width, depth, heads)
