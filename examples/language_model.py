"""Language: a byte-level model of Python source text, two replicas, DiLoCo. Run: python examples/language_model.py

The tokens are one array in Zarr; a sample is 64 bytes, and its target the 64 bytes that begin one later. `dtrain init
demo` writes a larger version of this as a project. `python examples/language_model.py 120 language_model.png` trains
longer and draws the bits per byte beside those of counting (matplotlib).
"""

import lzma
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
    """Train in a directory; return the run and its samples."""
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
    run = dtrain.train(
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
    return run, samples


def text_of(samples, split):
    """Return the windows of a split with their last target, int64[window, byte]."""
    parts = []
    for replica in range(2 if split == "train" else 1):
        with dtrain.batches(samples, split=split, replica=replica, replicas=2) as batches:
            parts += [torch.cat([inputs, targets[:, -1:]], 1).numpy() for (inputs,), targets in batches]
    return np.concatenate(parts)


def bits_of_counting(samples, most):
    """Return the bits per byte of counts of what follows the last 0, 1, ... `most` bytes, on the validation split.

    Each order is mixed with the one below as Witten and Bell do (1991): n bytes have followed c times, t different
    ones, and p = (c + t p_below) / (n + t). A window is all that is known, as it is to the model.
    """
    train, validation = text_of(samples, "train"), text_of(samples, "val")
    probability, bits = np.full(validation[:, 1:].size, 1 / 256), []
    for order in range(most + 1):
        known, counts = np.unique(_keys(train, order), return_counts=True)
        contexts, starts = np.unique(known // 256, return_index=True)
        followed, different = np.add.reduceat(counts, starts), np.diff([*starts, len(known)])
        asked = _keys(validation, order)
        n, t = (_look_up(contexts, values, asked // 256) for values in (followed, different))
        mixed = (_look_up(known, counts, asked) + t * probability) / np.maximum(n + t, 1)
        probability = np.where(n > 0, mixed, probability)
        bits.append(-np.log2(probability).mean())
    return bits


def _keys(text, order):
    """Return each byte and the `order` ones before it as a number; zeros stand before the beginning of a window."""
    padded = np.pad(text, ((0, 0), (max(0, order - 1), 0)))
    end, length = padded.shape[1], text.shape[1] - 1
    columns = (padded[:, end - length - back : end - back] for back in range(order, -1, -1))
    return sum(column << (8 * (order - i)) for i, column in enumerate(columns)).ravel()


def _look_up(keys, values, asked):
    found = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[found] == asked, values[found], 0)


def bits_of_xz(samples):
    """Return the bits that a byte of the validation split adds to the training split compressed by xz."""
    train, validation = (text_of(samples, split)[:, 1:].astype("uint8").tobytes() for split in ("train", "val"))
    sizes = [len(lzma.compress(text, preset=9)) for text in (train, train + validation)]
    return 8 * (sizes[1] - sizes[0]) / len(validation)


def draw(run, counting, path):
    """Draw the bits per byte of the rounds, and those of counting."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    bits = run.history.val_bits_per_byte.dropna("round")
    axis.plot(bits["round"], bits, label="dtrain, 2 replicas")
    for order, value in list(enumerate(counting))[1:]:
        axis.axhline(value, color=f"C{order}", linestyle="--", label=f"counts after {order} byte{'s' * (order > 1)}")
    axis.set(xlabel="round", ylabel="bits per byte", ylim=(1.5, 5))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":  # Dask starts worker processes, which import this file
    with tempfile.TemporaryDirectory() as directory:
        run, samples = main(directory, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 30)
        counting = bits_of_counting(samples, most=4)
        print(f"{run.history.val_bits_per_byte.values[-1]:.2f} bits per byte", end="; ")
        print("counts after 0, 1, ... bytes:", ", ".join(f"{bits:.2f}" for bits in counting), end="; ")
        print(f"xz: {bits_of_xz(samples):.2f}")
        print(generate(run.model, "def "))
        if len(sys.argv) > 2:
            draw(run, counting, sys.argv[2])
