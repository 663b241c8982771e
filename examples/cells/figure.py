"""Draw which types of cells are taken for which, and print the skill beside baselines. Run: python figure.py

Needs matplotlib and scikit-learn. Further runs are further rows: python figure.py seed-1 seed-2 ...
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import dtrain

HERE = Path(__file__).parent


def read(samples, split, replicas, seed):
    """Return the genes and types of the cells of a split, as the run has cut it."""
    parts = []
    for replica in range(replicas if split == "train" else 1):
        options = {"split": split, "replica": replica, "replicas": replicas, "seed": seed}
        with dtrain.batches(samples, **options) as batches:
            parts += [(genes.numpy(), types.numpy()) for (genes,), types in batches]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def predictions(name):
    """Return the names of types, those of the test cells, and by method what it takes them for."""
    run = dtrain.load_run(HERE / "runs" / name)
    data, seed = run.config.data, run.config.train.seed
    tables = {"inputs": data.inputs, "targets": data.targets, "split": data.split}
    samples = dtrain.open_samples(HERE / data.path, **tables)  # without balance: each cell once
    genes, types = read(samples, "train", run.plan.replicas, seed)
    test_genes, test_types = read(samples, "test", run.plan.replicas, seed)
    methods = {
        "most frequent type": DummyClassifier(strategy="most_frequent"),
        "logistic regression": LogisticRegression(C=0.3, class_weight="balanced", max_iter=3000),
    }
    said = {method: model.fit(genes, types).predict(test_genes) for method, model in methods.items()}
    with torch.inference_mode():
        said["dtrain"] = run.model(torch.from_numpy(test_genes)).argmax(1).numpy()
    return samples.variable(data.targets[0]).categories.names, test_types, said


def main(names):
    """Print accuracy and macro f1 of the test cells of some runs, and draw the last one as cells.png."""
    scores = {}
    for name in names:
        labels, types, said = predictions(name)
        for method, guesses in said.items():
            score = accuracy_score(types, guesses), f1_score(types, guesses, average="macro", labels=np.unique(types))
            scores.setdefault(method, []).append(score)
    print(f"{len(types)} test cells     accuracy       f1, mean of types")
    for method, rows in scores.items():
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
        print(f"{method:20} {mean[0]:.3f} +- {spread[0]:.3f}  {mean[1]:.3f} +- {spread[1]:.3f}")
    draw(labels, confusion_matrix(types, said["dtrain"], labels=range(len(labels))))


def draw(labels, counts):
    figure, axis = plt.subplots(figsize=(6.4, 5), layout="constrained")
    axis.imshow(np.sqrt(counts), cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axis.text(column, row, count, ha="center", va="center", color="w" if count > counts.max() / 4 else "k")
    axis.set(xlabel="predicted", ylabel="type of the cell")
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axis.set_yticks(range(len(labels)), labels)
    figure.savefig(HERE / "cells.png", dpi=80)


if __name__ == "__main__":
    main(sys.argv[1:] or ["cells"])
