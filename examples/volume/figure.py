"""Draw a plane of the scan, its tissues and what is predicted, and print dice beside thresholds. Run: python figure.py

Needs matplotlib, scipy, and predicted.zarr (README.md). The baseline: two thresholds of brightness after smoothing, the
best ones of the training places; it sees the same patches.
"""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import zarr
from PIL import Image
from scipy.ndimage import gaussian_filter

import dtrain

TISSUES = {"grey matter": 1, "white matter": 2}
SMOOTHING = (0.0, 0.6, 0.8, 1.0, 1.2)


def patches(run, directory, split):
    """Yield the scan and its tissues, uint8[patch, z, y, x] each, in batches of the patches of a split."""
    data, replicas = run.config.data, run.plan.replicas
    tables = {"inputs": data.inputs, "targets": data.targets, "patch": data.patch, "split": data.split}
    samples = dtrain.open_samples(Path(directory, data.path), **tables)
    for replica in range(replicas if split == "train" else 1):
        with dtrain.batches(samples, split=split, replica=replica, replicas=replicas) as batches:
            yield from ((scan.numpy(), tissue.numpy()) for (scan,), tissue in batches)


def smoothed(scan, sigma):
    return gaussian_filter(scan.astype("float32"), sigma, axes=(1, 2, 3)).round().astype(int)


def thresholds(counts):
    """Return the thresholds with the best mean dice, and that mean; counts[tissue, brightness] are of voxels."""
    below = np.concatenate([np.zeros((3, 1), int), counts.cumsum(1)], axis=1)  # of each tissue, darker than a threshold
    size, best = counts.sum(1), (0.0, 0, 0)
    for low in range(256):
        high = np.arange(low, 257)
        grey = 2 * (below[1, high] - below[1, low]) / (below[:, high].sum(0) - below[:, low].sum() + size[1])
        white = 2 * (size[2] - below[2, high]) / (size.sum() - below[:, high].sum(0) + size[2])
        best = max(best, *zip((grey + white) / 2, [low] * len(high), high, strict=True))
    return best


def fit(run, directory):
    """Return the smoothing and the two thresholds that are best for the training places."""
    counts = {sigma: np.zeros((3, 256), int) for sigma in SMOOTHING}
    for scan, tissue in patches(run, directory, "train"):
        for sigma, own in counts.items():
            own += np.bincount((tissue * 256 + smoothed(scan, sigma)).ravel(), minlength=768).reshape(3, 256)
    (_, low, high), sigma = max((thresholds(own), sigma) for sigma, own in counts.items())
    return sigma, low, high


def by_threshold(scan, sigma, low, high):
    values = smoothed(scan, sigma)
    return (values >= low).astype(int) + (values >= high)


def main(directory):
    """Print the dice of each tissue in the test places, and write volume.png."""
    run = dtrain.load_run(Path(directory, "runs", "volume"))
    chosen = fit(run, directory)
    print("smoothing {}, thresholds {} and {}".format(*chosen))
    counts = {method: np.zeros((3, 3), int) for method in ("thresholds", "dtrain")}
    for scan, tissue in patches(run, directory, "test"):
        with torch.inference_mode():
            said = {
                "thresholds": by_threshold(scan, *chosen),
                "dtrain": run.model(torch.from_numpy(scan)).argmax(1).numpy(),
            }
        for method, own in counts.items():
            own += np.bincount((tissue * 3 + said[method]).ravel(), minlength=9).reshape(3, 3)
    print("dice of test places  " + "  ".join(TISSUES))
    for method, own in counts.items():
        dice = [2 * own[i, i] / (own[i].sum() + own[:, i].sum()) for i in TISSUES.values()]
        print(f"{method:21}" + "".join(f"{value:11.3f}   " for value in dice))
    draw(directory, chosen)


def draw(directory, chosen, plane=75):
    image = zarr.open_group(Path(directory, "brain.zarr"), mode="r")
    predicted = zarr.open_group(Path(directory, "predicted.zarr"), mode="r")
    scan = image["0"][0]
    pictures = {
        "scan": scan[plane],
        "tissues": image["labels/tissue/0"][0, plane],
        "predicted": predicted["tissue"][0, plane],
        "thresholds": by_threshold(scan[None], *chosen)[0, plane],
    }
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture[25:210, 22:176], cmap="gray", origin="lower", interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=58)
    Image.open(drawn).convert("L").save(Path(directory, "volume.png"), optimize=True)  # all of it is grey


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
