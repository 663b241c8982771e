"""A small decoder-only transformer over bytes, with or without LoRA adapters in its linear layers."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT = 128


class LoRALinear(nn.Linear):
    """A linear layer, W x + b + (alpha / rank) B A x, of which A and B are to be trained, and W and b frozen.

    It is the layer itself with two more parameters: `weight` and `bias` keep the names that they have in a run without
    adapters. B begins as 0, so that the model begins as that of the run (Hu et al. 2021, arXiv:2106.09685).
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32[..., outputs] for float32[..., inputs]."""
        return super().forward(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)


class Block(nn.Module):
    """Attention to what came before, then a perceptron; both add to the stream."""

    def __init__(self, width: int, heads: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = linear(width, 3 * width), linear(width, width)
        self.expand, self.contract = linear(width, 4 * width), linear(4 * width, width)

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

    def __init__(self, width: int, depth: int, heads: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, heads, linear) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, position, 256] for int64[sample, position]."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


def build(rank: int = 0, alpha: float = 16.0, width: int = 96, depth: int = 2, heads: int = 4) -> nn.Module:
    """Return the module; `rank` 0 is the one without adapters."""
    linear = partial(LoRALinear, rank=rank, alpha=alpha) if rank else nn.Linear
    return LanguageModel(width, depth, heads, linear)
