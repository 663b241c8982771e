"""Language: a byte-level model of Python source text, two replicas, DiLoCo. Run: python examples/language_model.py

The tokens are one array in Zarr; a sample is 64 bytes, and its target the 64 bytes that begin one later. `dtrain init
demo` writes a larger version of this as a project.
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr
from torch import nn

import dtrain

CONTEXT = 64


def write_tokens(path, num_bytes):
    """Write source files of the standard library as uint8[position], cut into chunks of 16,384 bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:num_bytes]
    dataset = xr.Dataset({"tokens": (("position",), np.frombuffer(text, np.uint8))})
    with zarr.config.set({"array.write_empty_chunks": True}):
        dataset.to_zarr(path, encoding={"tokens": {"chunks": (16_384,)}}, consolidated=False)


class LanguageModel(nn.Module):
    """A decoder-only transformer: bytes -> logits of the next byte at every position."""

    def __init__(self, width, depth):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.logits = nn.Linear(width, 256)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embed(tokens) + self.position[:length]
        return self.logits(self.layers(x, mask=mask, is_causal=True))


def build(width=64, depth=2):
    return LanguageModel(width, depth)


def generate(model, prompt, length=200):
    """Return the prompt and what the model adds to it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([list(prompt.encode())])
    with torch.inference_mode():
        for _ in range(length):
            probabilities = (model(tokens[:, -CONTEXT:])[0, -1] / 0.7).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def main(directory, cluster="local", rounds=30, num_bytes=2_000_000):
    """Train in a directory; return the run."""
    write_tokens(Path(directory, "tokens.zarr"), num_bytes)
    samples = dtrain.open_samples(
        Path(directory, "tokens.zarr"),
        inputs=["tokens"],
        targets=["tokens"],
        input_offsets=dict(start=0, stop=CONTEXT),
        target_offsets=dict(start=1, stop=CONTEXT + 1),
        stride=CONTEXT,
        split=dict(val=0.03, test=0.0),
    )
    return dtrain.train(
        build,
        samples,
        train=dict(
            loss="cross_entropy",
            metrics=["bits_per_byte"],
            rounds=rounds,
            local_steps=10,
            batch_size=32,
            optimizer="adamw",
            optimizer_args=dict(lr=0.003),
            warmup_steps=20,
            clip_norm=1.0,
        ),
        average=dict(replicas=2, outer=dict(optimizer="sgd", args=dict(lr=0.7, momentum=0.6, nesterov=True))),
        cluster=cluster,
        run_dir=Path(directory, "runs"),
    )


if __name__ == "__main__":  # Dask starts worker processes, which import this file
    with tempfile.TemporaryDirectory() as directory:
        run = main(directory, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 30)
        print(f"{run.history.val_bits_per_byte.values[-1]:.2f} bits per byte")
        print(generate(run.model, "def "))
