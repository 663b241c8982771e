"""Let the trained model write. Run: python generate.py [RUN] [PROMPT]."""

import sys
from pathlib import Path

import torch
from torch import nn

import dtrain

CONTEXT = 128


def generate(model: nn.Module, prompt: str, length: int = 400, temperature: float = 0.7, seed: int = 0) -> str:
    """Return the prompt and `length` bytes that the model adds to it, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    with torch.inference_mode():
        for _ in range(length):
            logits = model(tokens[:, -CONTEXT:])[:, -1]
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    run = dtrain.load_run(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "runs" / here.name)
    bits = run.history.val_bits_per_byte.values[-1]
    print(f"A sample of the model ({bits:.2f} bits per byte on files it has never seen):\n")
    print(generate(run.model, sys.argv[2] if len(sys.argv) > 2 else "def "))
