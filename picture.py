"""Draws the one idea of this project: a hidden state, its threshold, and the rows of W that are never read.

The hidden state is a real one, the input of a down projection of the default model while it reads a sentence.

    python picture.py figures/idea.png
"""

import sys

import matplotlib
import torch

import calibrate
from checkpoint import load
from model import PROJECTIONS, dense

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after choosing a backend that needs no screen)

LAYER, SPARSITY, CHANNELS, COLUMNS = 15, 0.5, 48, 40


def hidden_state(model, tokenizer):
    """The input of a down projection at the last word of a sentence, float32 [intermediate_size]."""
    seen = []

    def project(x, p):
        if (p.layer, p.site) == (LAYER, "down"):
            seen.append(x[-1].float())
        return dense(x, p)

    model.forward(torch.tensor(tokenizer.encode("The sky is blue because the air scatters light.")), project=project)
    return seen[0]


def draw(x, threshold, path):
    """x [CHANNELS] as bars beside W^T, a row a channel, its dropped rows left blank."""
    kept = x.abs() > threshold
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8, 5), width_ratios=[2, 3], layout="constrained")
    colors = ["tab:blue" if keep else "lightgray" for keep in kept]
    left.barh(range(len(x)), x, color=colors)
    for edge in (-threshold, threshold):
        left.axvline(edge, color="tab:red", linewidth=1)
    left.set(title="hidden state x, threshold in red", ylabel="channel k", ylim=(len(x), -1))
    weights = torch.rand(len(x), COLUMNS, generator=torch.Generator().manual_seed(0)) / 2 + 0.4
    weights[~kept] = float("nan")
    right.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    right.set(title=f"W, one row a channel: {(~kept).sum()} of {len(x)} rows are never read", xticks=[],
              xlabel="output channels, contiguous in memory")
    figure.savefig(path, dpi=120)


def main():
    model, tokenizer = load()
    threshold = calibrate.find(model).thresholds(SPARSITY)[LAYER, PROJECTIONS.index("down")].item()
    draw(hidden_state(model, tokenizer)[:CHANNELS], threshold, sys.argv[1])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python picture.py FILE.png")
    main()
