"""The example of the original text on distributed training. Run: python examples/original_example.py

Two linear layers, the matrix of one multiplied with that of the other, the mean squared error, SGD with learning rate
0.01 and momentum 0.9, batches of 100, 10 epochs; then loss and accuracy on a test set. The text cuts the data into k
equal parts, runs SGD on each, and merges the parameters: here k = 2 and an epoch a round, on handwritten digits.
"""

import tempfile
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from sklearn.datasets import load_digits
from torch import nn

import dtrain


class Product(nn.Module):
    """Two linear layers, multiplied: second (first x)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 10)

    def forward(self, image):
        return self.second(self.first(image.flatten(1)))


def build():
    return Product()


def accuracy(outputs, targets):
    """Return the share of samples whose largest output is the class that is 1 in the target."""
    return (outputs.argmax(1) == targets.argmax(1)).float().mean()


def write_digits(path):
    """Write standardised images float32[sample, y, x] and one-hot classes float32[sample, class]."""
    digits = load_digits()
    images = (digits.images - digits.images.mean()) / digits.images.std()
    dataset = xr.Dataset(
        {
            "image": (("sample", "y", "x"), images.astype("float32")),
            "one_hot": (("sample", "class"), np.eye(10, dtype="float32")[digits.target]),
        }
    )
    encoding = {"image": {"chunks": (100, 8, 8)}, "one_hot": {"chunks": (100, 10)}}
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is data, not a missing chunk
        dataset.to_zarr(path, encoding=encoding, consolidated=False)


def main(directory, cluster="local"):
    """Train in a directory and return loss and accuracy on the test set."""
    write_digits(Path(directory, "digits.zarr"))
    samples = dtrain.open_samples(
        Path(directory, "digits.zarr"), inputs=["image"], targets=["one_hot"], split=dict(val=0.0, test=0.2)
    )
    run = dtrain.train(
        build,
        samples,
        train=dict(
            loss="mse",
            metrics=["original_example:accuracy"],
            rounds=10,
            batch_size=100,
            optimizer="sgd",
            optimizer_args=dict(lr=0.01, momentum=0.9),
        ),
        average=dict(replicas=2),
        cluster=cluster,
        run_dir=Path(directory, "runs"),
    )
    return run.evaluate(split="test", round="last")


if __name__ == "__main__":  # Dask starts worker processes, which import this file
    with tempfile.TemporaryDirectory() as directory:
        found = main(directory)
        print(f"test loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f}")
