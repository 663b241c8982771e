"""Images -> classes: handwritten digits from Zarr, a perceptron, two replicas. Run: python examples/digits.py

Needs scikit-learn for the data (pip install "dtrain[demo]"). Held-out accuracy is 0.99, that of logistic
regression 0.97. `python examples/digits.py digits.png` also draws the digits that are taken for others (matplotlib).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
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
    """Train in a directory and return the run and its samples."""
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
    return run, samples


def read(samples, split):
    """Return the images and labels of a split, as the run has cut it: float32[sample, 8, 8] and int64[sample]."""
    parts = []
    for replica in range(2 if split == "train" else 1):
        with dtrain.batches(samples, split=split, replica=replica, replicas=2) as batches:
            parts += [(image.numpy(), label.numpy()) for (image,), label in batches]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def logistic_regression(samples):
    """Return the accuracy of logistic regression on the same splits."""
    from sklearn.linear_model import LogisticRegression

    (images, labels), (test_images, test_labels) = read(samples, "train"), read(samples, "test")
    model = LogisticRegression(max_iter=2000).fit(images.reshape(len(images), -1), labels)
    return model.score(test_images.reshape(len(test_images), -1), test_labels)


def draw(run, samples, path):
    """Draw the test images that the model takes for another digit."""
    import matplotlib.pyplot as plt

    images, labels = read(samples, "test")
    with torch.inference_mode():
        said = run.model(torch.from_numpy(images)).argmax(1).numpy()
    wrong = np.flatnonzero(said != labels)[:10]
    figure, axes = plt.subplots(1, max(1, len(wrong)), figsize=(6, 1.6), squeeze=False, layout="constrained")
    for axis, i in zip(axes[0], wrong, strict=False):
        axis.imshow(images[i], cmap="gray_r")
        axis.set(title=f"{labels[i]}, taken for {said[i]}", xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":  # Dask starts worker processes, which import this file
    with tempfile.TemporaryDirectory() as directory:
        run, samples = main(directory)
        print(f"test accuracy {run.evaluate(split='test')['accuracy']:.3f}, of logistic regression", end=" ")
        print(f"{logistic_regression(samples):.3f}")
        if sys.argv[1:]:
            draw(run, samples, sys.argv[1])
