"""Local SGD written by hand: numpy and torch, no dtrain. Run: python examples/local_sgd_by_hand.py

The same mathematics as dtrain with ``shuffle = false``, ``partition = "contiguous"`` and
``split_order = "sequential"``, in one place to read from top to bottom. A test trains the same data with dtrain and
compares the parameters bit for bit.
"""

import hashlib

import numpy as np
import torch
from torch import nn

SAMPLES, FEATURES, CLASSES = 1000, 20, 4
VAL = TEST = 0.1
REPLICAS, ROUNDS, LOCAL_EPOCHS, BATCH = 3, 5, 2, 32
LEARNING_RATE, MOMENTUM, SEED = 0.05, 0.9, 7


def make_data():
    """Return x: float32[sample, feature] and y: int64[sample], classes of a random linear map."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1)
    return x, y


def build():
    """Return the model."""
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def train(x, y):
    """Return the averaged model after all rounds."""
    torch.set_num_threads(1)  # the number of threads decides bits

    # cut the data: first the training part, then validation and test, which we do not touch here
    num_train = SAMPLES - round(SAMPLES * VAL) - round(SAMPLES * TEST)
    cuts = [round(k * num_train / REPLICAS) for k in range(REPLICAS + 1)]
    parts = [(x[a:b], y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]

    # every replica begins with the same parameters and an optimizer of its own
    torch.manual_seed(SEED)
    theta = build()
    replicas = [build() for _ in parts]
    optimizers = [torch.optim.SGD(replica.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM) for replica in replicas]

    for _ in range(ROUNDS):
        for replica, optimizer, (part_x, part_y) in zip(replicas, optimizers, parts, strict=True):
            replica.load_state_dict(theta.state_dict())
            for _ in range(LOCAL_EPOCHS):
                for start in range(0, len(part_x), BATCH):
                    batch_x = torch.from_numpy(part_x[start : start + BATCH])
                    batch_y = torch.from_numpy(part_y[start : start + BATCH])
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(replica(batch_x), batch_y).backward()
                    optimizer.step()

        # the mean, weighted by samples: integer weights, a float64 sum in replica order, one division
        weights = [LOCAL_EPOCHS * len(part_x) for part_x, _ in parts]
        mean = {}
        for name in theta.state_dict():
            total = sum(w * r.state_dict()[name].double() for w, r in zip(weights, replicas, strict=True))
            mean[name] = (total / sum(weights)).float()
        theta.load_state_dict(mean)
    return theta


def params_sha256(model):
    """Return the SHA-256 that names a set of parameters (as dtrain prints it)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    x, y = make_data()
    model = train(x, y)
    num_test = round(SAMPLES * TEST)
    predicted = model(torch.from_numpy(x[-num_test:])).argmax(1).numpy()
    print(f"test accuracy {(predicted == y[-num_test:]).mean():.3f}")
    print(f"params_sha256 {params_sha256(model)}")
