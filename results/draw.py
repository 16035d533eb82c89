"""Draws the idea of this project: a hidden state, its threshold, and the rows of W that are never
read. The hidden state is a real one: the input of a down projection of the default model, at the
end of a sentence.

    python -m results.draw results/idea.png
"""

import matplotlib
import torch

from calibrations.thresholds import find
from checkpoint import load
from cli.command_line import make_parser, run_script
from model import PROJECTIONS, dense

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after choosing a backend that needs no screen)

LAYER, SPARSITY, CHANNELS, COLUMNS = 15, 0.5, 48, 40  # what it shows


def hidden_state(model, tokenizer):
    """The input of a down projection at the last token of a sentence, float32
    [intermediate_size]."""
    seen = []

    def project(x, linear):
        if (linear.layer, linear.site) == (LAYER, "down"):
            seen.append(x[-1].float())
        return dense(x, linear)

    text = "The sky is blue because the air scatters light."
    model.forward(torch.tensor(tokenizer.encode(text)), project=project)
    return seen[0]


def main():
    """Draw CHANNELS of a hidden state x as bars, next to them W^T, one row per channel, with its
    dropped rows left blank."""
    parser = make_parser(__doc__)
    parser.add_argument("path", metavar="FILE.png")
    path = parser.parse_args().path
    model, tokenizer = load()
    x = hidden_state(model, tokenizer)[:CHANNELS]
    calibration, place = find(model), (LAYER, PROJECTIONS.index("down"))
    threshold = calibration.thresholds(SPARSITY)[place].item()
    dropped = calibration.expected(SPARSITY)[place].item()
    kept = x.abs() > threshold
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8, 5), width_ratios=[2, 3],
                                         layout="constrained")
    colors = ["tab:blue" if keep else "lightgray" for keep in kept]
    left.barh(range(len(x)), x, color=colors)
    for edge in (-threshold, threshold):
        left.axvline(edge, color="tab:red", linewidth=1)
    left.set(title="hidden state x, threshold in red", ylabel="channel k", ylim=(len(x), -1))
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(x), COLUMNS, generator=generator) / 2 + 0.4
    weights[~kept] = float("nan")
    right.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    right.set(title=f"W, one row per channel: {(~kept).sum()} of {len(x)} rows are never read",
              xlabel="output channels, contiguous in memory", xticks=[])
    figure.suptitle(f"Sparsity {SPARSITY:.0%} of the whole model; this projection (down, layer "
                    f"{LAYER}) drops {dropped:.0%} on average")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main)
