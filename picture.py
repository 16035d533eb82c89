"""Draws two figures: the one idea of this project, and what it makes of the speed.

The idea is a hidden state, its threshold, and the rows of W that are never read. The hidden state is a real one, the
input of a down projection of the default model while it reads a sentence. The speed is tokens a second against
sparsity, from files that benchmark.py wrote: solid as measured, dashed the limit, read bandwidth over bytes a token.

    python picture.py figures/idea.png
    python picture.py figures/speed.png results/llama-2-7b.json results/llama-3-8b.json
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch

import calibration
from checkpoint import load
from model import PROJECTIONS, dense

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after choosing a backend that needs no screen)

LAYER, SPARSITY, CHANNELS, COLUMNS = 15, 0.5, 48, 40
CONTEXT = 200  # tokens; speeds at other contexts are left out
COLORS = {"bfloat16": "tab:blue", "int8": "tab:orange", "float16": "tab:green", "float32": "tab:purple"}


# ---------------------------------------------------------------- the idea

def hidden_state(model, tokenizer):
    """The input of a down projection at the last word of a sentence, float32 [intermediate_size]."""
    seen = []

    def project(x, p):
        if (p.layer, p.site) == (LAYER, "down"):
            seen.append(x[-1].float())
        return dense(x, p)

    model.forward(torch.tensor(tokenizer.encode("The sky is blue because the air scatters light.")), project=project)
    return seen[0]


def draw_idea(x, threshold, path):
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


# ---------------------------------------------------------------- the speed

def draw_speed(rows, path):
    """Rows of benchmark.py: a panel for each model and GPU, in it a colour for each kind of weights."""
    panels = {}  # (model, GPU) -> {kind of weights, or another engine: its rows}
    for row in rows:
        kind = f"{row['engine']}, {row['dtype']}" if "engine" in row else row["quantize"] or row["dtype"]
        panels.setdefault((row["config"], row["gpu"]), {}).setdefault(kind, []).append(row)

    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(1 + 4.5 * len(panels), 4), layout="constrained")
    for axis, ((config, gpu), kinds) in zip(axes[0], panels.items()):
        for kind, line in kinds.items():
            if "engine" in line[0]:
                axis.axhline(line[-1]["tokens_per_second"], color="grey", linestyle=":", label=kind)
                continue
            line.sort(key=lambda row: row["realised_sparsity"])
            sparsity = [row["realised_sparsity"] for row in line]
            limit = [row["read_bandwidth"] / row["bytes_per_token"] for row in line]
            color = COLORS[kind]
            axis.plot(sparsity, [row["tokens_per_second"] for row in line], color, marker="o", label=kind)
            axis.plot(sparsity, limit, color, linestyle="--", linewidth=1, label=f"{kind}, the limit")
        axis.set(title=f"{config}, {gpu}", xlabel="sparsity reached", ylabel="tokens a second", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=150)


def main(path, *results):
    """Draw the idea, or from results the speed, into the file `path`."""
    if not results:
        model, tokenizer = load()
        threshold = calibration.find(model).thresholds(SPARSITY)[LAYER, PROJECTIONS.index("down")].item()
        draw_idea(hidden_state(model, tokenizer)[:CHANNELS], threshold, path)
        return
    rows = []
    for file in results:
        try:
            rows += [row for row in json.loads(Path(file).read_text()) if row.get("context") == CONTEXT]
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a file that benchmark.py --json wrote ({error})") from None
    if not rows:
        raise ValueError(f"there are no speeds at context {CONTEXT} in {', '.join(map(str, results))}")
    draw_speed(rows, path)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("usage: python picture.py FILE.png [RESULTS.json ...]", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError) as error:
        print(f"picture.py: error: {error}", file=sys.stderr)
        sys.exit(2)
