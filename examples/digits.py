"""Images -> classes: handwritten digits from Zarr, a perceptron, two replicas. Run: python examples/digits.py

Needs scikit-learn for the data (pip install "dtrain[demo]"). Held-out accuracy is above 0.95.
"""

import tempfile
from pathlib import Path

import xarray as xr
import zarr
from sklearn.datasets import load_digits
from torch import nn

import dtrain


def write_digits(path):
    """Write images float32[sample, y, x] and labels int64[sample] in chunks of 100 samples."""
    digits = load_digits()
    dataset = xr.Dataset(
        {
            "image": (("sample", "y", "x"), (digits.images / 16).astype("float32")),
            "label": (("sample",), digits.target.astype("int64")),
        }
    )
    encoding = {"image": {"chunks": (100, 8, 8)}, "label": {"chunks": (100,)}}
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is data, not a missing chunk
        dataset.to_zarr(path, encoding=encoding, consolidated=False)


def build():
    """Return the model; it is called with float32[sample, 8, 8]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def main(directory, cluster="local"):
    """Train in a directory and return the accuracy on the test split."""
    write_digits(Path(directory, "digits.zarr"))
    samples = dtrain.open_samples(Path(directory, "digits.zarr"), inputs=["image"], targets=["label"])
    run = dtrain.train(
        build,
        samples,
        train=dict(
            loss="cross_entropy",
            metrics=["accuracy"],
            rounds=20,
            batch_size=32,
            optimizer_args=dict(lr=0.05, momentum=0.9),
        ),
        average=dict(replicas=2),
        cluster=cluster,
        run_dir=Path(directory, "runs"),
    )
    print(run.history[["train_loss", "val_loss", "val_accuracy"]].to_dataframe())
    return run.evaluate(split="test")["accuracy"]


if __name__ == "__main__":  # Dask starts worker processes, which import this file
    with tempfile.TemporaryDirectory() as directory:
        print(f"test accuracy {main(directory):.3f}")
