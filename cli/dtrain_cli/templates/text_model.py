"""A small decoder-only transformer over tokens."""

import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
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
    """Tokens -> logits of the next token at every position. The embedding is also the output layer."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, position, token] for int64[sample, position]."""
        largest = int(tokens.max())
        if largest >= len(self.embed.weight):
            raise ValueError(f"token {largest} is there: raise model_args.vocabulary, now {len(self.embed.weight)}")
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.T


def build(vocabulary: int, context: int, width: int = 96, depth: int = 2, heads: int = 4) -> nn.Module:
    """Return the module for samples of `context` tokens."""
    return LanguageModel(vocabulary, context, width, depth, heads)


def next_token(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the cross entropy of each token with the output before it, as sum and count: for texts of one length."""
    logits, following = outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    return F.cross_entropy(logits, following, reduction="sum"), following.numel()
