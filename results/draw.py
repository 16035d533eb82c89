"""Draws two figures: the idea of this project, and the speed that it gives.

`idea` shows a hidden state, its threshold, and the rows of W that are never read. The hidden
state is a real one: the input of a down projection of the default model, at the end of a
sentence. `speed` shows tokens a second against sparsity, from files that benchmark.py wrote.
Solid lines are measured. Dashed lines are the limit: read bandwidth over the bytes that a token
reads.

    python -m results.draw idea results/idea.png
    python -m results.draw speed results/speed.png results/llama-2-7b-h100.json
"""

import matplotlib
import torch

from calibrations.thresholds import find
from checkpoint import load
from cli.command_line import make_parser, run_script
from cli.results import read_rows
from model import PROJECTIONS, dense

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after choosing a backend that needs no screen)

LAYER, SPARSITY, CHANNELS, COLUMNS = 15, 0.5, 48, 40  # what the idea shows
CONTEXT = 200  # tokens; speeds at other contexts are left out
COLORS = {"bfloat16": "tab:blue", "int8": "tab:orange", "float16": "tab:green",
          "float32": "tab:purple"}


# ---- the idea ----------------------------------------------------------------------------------

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


def draw_idea(path):
    """Draw CHANNELS of a hidden state x as bars, next to them W^T, one row per channel, with its
    dropped rows left blank."""
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


# ---- the speed ---------------------------------------------------------------------------------

def read_results(files):
    """The rows of benchmark.py's --json files at context CONTEXT. Raises ValueError if there are
    none."""
    rows = [row for file in files for row in read_rows(file, "tokens_per_second")
            if row["context"] == CONTEXT]
    if not rows:
        raise ValueError(
            f"there are no speeds at context {CONTEXT} in {', '.join(map(str, files))}")
    return rows


def draw_speed(path, files):
    """Draw benchmark.py's results: a panel for each model and GPU. In it, each kind of weights
    has a colour, and each other engine a dotted line."""
    panels = {}  # (model, GPU) -> {kind of weights, or another engine: its rows}
    for row in read_results(files):
        if "engine" in row:
            kind = f"{row['engine']}, {row['dtype']}"
        else:
            kind = row["quantize"] or row["dtype"]
        kinds = panels.setdefault((row["config"], row["gpu"]), {})
        kinds.setdefault(kind, []).append(row)

    figure, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained",
                                figsize=(1 + 4.5 * len(panels), 4))
    for axis, ((config, gpu), kinds) in zip(axes[0], panels.items()):
        for kind, rows in kinds.items():
            if "engine" in rows[0]:
                axis.axhline(rows[-1]["tokens_per_second"], color="grey", linestyle=":",
                             label=kind)
                continue
            rows.sort(key=lambda row: row["realised_sparsity"])
            sparsity = [row["realised_sparsity"] for row in rows]
            speed = [row["tokens_per_second"] for row in rows]
            limit = [row["read_bandwidth"] / row["bytes_per_token"] for row in rows]
            axis.plot(sparsity, speed, COLORS[kind], marker="o", label=kind)
            axis.plot(sparsity, limit, COLORS[kind], linestyle="--", linewidth=1,
                      label=f"{kind}, the limit")
        axis.set(title=f"{config}, {gpu}", xlabel="sparsity reached", ylabel="tokens a second",
                 ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=150)


# ---- the command line --------------------------------------------------------------------------

def main():
    parser = make_parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    idea = figures.add_parser("idea", help="what is not read")
    idea.add_argument("path", metavar="FILE.png")
    speed = figures.add_parser("speed", help="tokens a second against sparsity")
    speed.add_argument("path", metavar="FILE.png")
    speed.add_argument("results", nargs="+", metavar="RESULTS.json", help="from benchmark.py")
    args = parser.parse_args()
    if args.figure == "idea":
        draw_idea(args.path)
    else:
        draw_speed(args.path, args.results)


if __name__ == "__main__":
    run_script(main)
