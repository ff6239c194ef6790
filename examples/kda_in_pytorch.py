"""Trains a plain PyTorch model with KDA layers to copy: the second half of each sequence repeats the first half.

    python examples/kda_in_pytorch.py

The example needs only torch and lkda. It takes a few seconds on a CPU. On a GPU, it uses lkda's CUDA kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lkda.layers import KimiDeltaAttention

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 32, 32, 2, 2, 8


class Block(nn.Module):
    """x + KDA(norm(x)), then x + MLP(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.kda = KimiDeltaAttention(WIDTH, HEADS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, WIDTH] -> the same shape."""
        mixed, _ = self.kda(self.norms[0](x))  # the second value is the state after the last token
        x = x + mixed
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits."""
        return self.head(self.blocks(self.embed(tokens)))


def main(steps: int = 200) -> float:
    """Trains the model and prints the accuracy in the copied half every 100 steps. Returns the last accuracy."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    # Without weight decay: A_log and dt_bias, which set the decay rates of the state, must not have it.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    accuracy = 0.0
    for step in range(1, steps + 1):
        half = torch.randint(VOCAB, (32, LENGTH), device=device)
        tokens = torch.cat([half, half], dim=1)
        logits = model(tokens[:, :-1])[:, LENGTH - 1 :]  # predictions of the second half
        loss = F.cross_entropy(logits.flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            accuracy = (logits.argmax(-1) == half).float().mean().item()
            print(f"step {step}: loss {loss.item():.3f}, copied correctly {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
