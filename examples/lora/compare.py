"""Print and draw what the two ways of fine-tuning have reached, sent and written. Run: python compare.py

Draws lora.png where matplotlib is installed.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def draw(directory, path):
    """Draw the bits per byte of held-out texts over the bytes that have been averaged."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, label in (("full", "all parameters"), ("lora", "adapters of rank 8")):
        rows = [row for row in lines(Path(directory, "runs", name, "history.jsonl")) if "val_bits_per_byte" in row]
        sent = [row["bytes_reduced"] * row["round"] / 1e6 for row in rows]
        axis.semilogx(sent, [row["val_bits_per_byte"] for row in rows], "o-", markersize=3, label=label)
    axis.set(xlabel="MB averaged", ylabel="bits per byte, held-out texts")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def main(directory):
    """Print a row for each run, and return them."""
    rows = []
    for run in (Path(directory, "runs", name) for name in ("full", "lora")):
        last = lines(run / "history.jsonl")[-1]
        commit = [event for event in lines(run / "events.jsonl") if event["event"] == "RoundCommitted"][-1]
        rows.append((run.name, last["val_bits_per_byte"], last["bytes_reduced"], commit["bytes"]))
    print("run     bits per byte   bytes averaged a round   bytes a commit")
    for name, bits, averaged, committed in rows:
        print(f"{name:8}{bits:13.3f}{averaged:25,}{committed:17,}")
    return rows


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    main(place)
    if find_spec("matplotlib"):
        draw(place, Path(place, "lora.png"))
