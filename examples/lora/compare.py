"""Print what the two ways of fine-tuning have reached, sent and written. Run: python compare.py"""

import json
import sys
from pathlib import Path


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


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
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
