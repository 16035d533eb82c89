"""What sparsity costs: perplexity of a text at a list of sparsities, next to the dense model's.

The text is cut into windows. Where the model's texts begin with a token of their own (BOS), it
takes the place of each window's first token, as in llama.cpp's perplexity. As in use, the first
half of each window is a dense prefill, and the second half is read through the thresholds. The next
tokens of the second half are scored (TEAL: Liu et al. 2024, arXiv:2408.14690, section 5.1). That
half goes through the model at once, with the input of every projection masked. This computes the
same as decoding token by token, because a token's mask depends only on that token. Next to the
perplexity stand the sparsity that the masks really reach, the mean KL divergence of the sparse
predictions from the dense ones, and how often both predict the same token.

    python evaluate.py --text wiki.test.raw --window 1024 --windows 8 --plot quality.png
    python evaluate.py --text wiki.test.raw --sparsity 0 0.5 --calibration mine.safetensors
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from calibrate import begin_with, second_half
from calibrations.allocations import byte_shares
from calibrations.thresholds import Calibration, candidates
from checkpoint import default_model
from checkpoint.digest import weights_digest
from checkpoint.files import read_text, require_writable
from cli.command_line import (
    COUNT,
    add_calibrations,
    add_json,
    add_model_flags,
    add_sparsities,
    between,
    load_model,
    make_parser,
    run_script,
)
from cli.progress import progress
from cli.results import replaced, require_rows, write_rows
from model import PROJECTIONS

# What was measured, known by its content: rows of --json that agree in all of these are the same
# measurement. `weights`, `tokens` and `thresholds` are hashes.
IDENTITY = ("weights", "dtype", "quantize", "tokens", "window", "allocation", "thresholds",
            "sparsity")


# ---- scoring -----------------------------------------------------------------------------------

@torch.no_grad()
def score(model, tokens, tables):
    """Score one window of token ids [T] under each table of thresholds: float32 [n_layers, 7], or
    None for dense.

    Returns a dict for each table. `nll` and `kl`, in nats, and `top1` are means over the second
    half. `sparsity`, float64 [n_layers, 7], is the share of each projection's inputs dropped
    there.
    """
    half = len(tokens) // 2
    first, second, targets = tokens[:half], tokens[half:-1], tokens[half + 1:]
    sparse = [table for table in tables if table is not None]
    passes = second_half(model, first, second, [None, *sparse])
    reference = next(passes)
    expected = model.logits(reference[0]).float().log_softmax(-1)

    results = []
    for table in tables:
        hidden, dropped = reference if table is None else next(passes)
        predicted = model.logits(hidden).float().log_softmax(-1)
        divergence = F.kl_div(predicted, expected, log_target=True, reduction="batchmean")
        same = predicted.argmax(-1) == expected.argmax(-1)
        results.append({"nll": F.nll_loss(predicted, targets).item(), "kl": divergence.item(),
                        "top1": same.double().mean().item(), "sparsity": dropped})
    return results


def evaluate(model, windows, tables):
    """`score` over windows [n, T]: for each table a dict of means, and `perplexity`."""
    # Window by window, so that all tables share a window's dense reference.
    scores = [score(model, tokens, tables)
              for tokens in progress("evaluating", len(windows), of=windows.to(model.device))]
    means = [{name: sum(result[name] for result in results) / len(results) for name in results[0]}
             for results in zip(*scores)]
    return [{"perplexity": math.exp(mean["nll"]), **mean} for mean in means]


def cut(tokens, window, offset=0, n=None):
    """A text's token ids -> n of its windows, from window number `offset` on: [n, window].

    Without n, all that follow, at least one. Raises ValueError if the text does not hold them.
    """
    held = len(tokens) // window
    n = n or max(1, held - offset)
    if offset + n > held:
        raise ValueError(
            f"the text holds {held} windows of {window} tokens; windows {offset} to "
            f"{offset + n - 1} were requested; give a longer text or other --window, --offset, "
            "--windows")
    return tokens[offset * window:(offset + n) * window].view(n, window)


def find_calibrations(model, files, allocations):
    """{allocation: Calibration}: from the files; without files, those available for this model."""
    given, found = [Calibration.load(path, model.config) for path in files], {}
    for calibration in given or candidates(model):
        name = calibration.metadata["allocation"]
        if given and name in found:
            raise ValueError(f"{calibration.path} is a second {name} calibration; give one file "
                             "for each allocation")
        found.setdefault(name, calibration)
    wanted = allocations or list(found) or ["fisher"]
    for name in wanted:
        if name not in found:
            raise ValueError(f"there is no {name} calibration for this model; make one with "
                             f"calibrate.py --allocation {name} and name it with --calibration")
    return {name: found[name] for name in wanted}


def settings(model, sparsities, files=(), allocations=None):
    """What to measure, dense first: for each calibration and sparsity a tuple of allocation,
    sparsity, source of the calibration, and thresholds, which are None for dense."""
    found, sparse = [("dense", 0.0, None, None)] * (0 in sparsities), sorted({*sparsities} - {0})
    for name, calibration in (
            find_calibrations(model, files, allocations).items() if sparse else ()):
        found += [(name, s, calibration.metadata.get("source"), calibration.thresholds(s))
                  for s in sparse]
    return found


# ---- results -----------------------------------------------------------------------------------

def digest(tensor):
    """16 hex digits that tell a tensor from others; None of None."""
    if tensor is None:
        return None
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def print_table(rows):
    print(f"{'allocation':<11}{'sparsity':>9}{'realised':>9}{'perplexity':>11}{'KL':>8}"
          f"{'top-1':>7}   realised " + " ".join(f"{name:>5}" for name in PROJECTIONS))
    for row in rows:
        print(f"{row['allocation']:<11}{row['sparsity']:>9.2f}{row['realised_sparsity']:>9.3f}"
              f"{row['perplexity']:>11.2f}{row['kl']:>8.4f}{row['top1']:>7.3f}            "
              + " ".join(f"{row['projections'][name]:>5.3f}" for name in PROJECTIONS))


def plot(path, rows):
    """Draw perplexity against the sparsity reached: a line for each allocation, from dense on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    start = [row for row in rows if row["sparsity"] == 0]
    for allocation in dict.fromkeys(row["allocation"] for row in rows if row["sparsity"] > 0):
        line = start + [row for row in rows if row["allocation"] == allocation]
        x, y = zip(*[(row["realised_sparsity"], row["perplexity"]) for row in line])
        axes.plot(x, y, marker="o", label=allocation)
    for row in start:
        axes.axhline(row["perplexity"], color="grey", linewidth=0.8, linestyle=":", label="dense")
    axes.set(xlabel="sparsity reached", ylabel="perplexity", yscale="log")
    axes.yaxis.set_minor_formatter("{x:g}")  # 30, not 3 x 10^1
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=150)


# ---- the command line --------------------------------------------------------------------------

def parse_args():
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--text", metavar="FILE", required=True, help="UTF-8 file to score")
    add("--window", type=COUNT, default=2048, metavar="N",
        help="tokens that see each other; the second half is scored (default: %(default)s)")
    add("--windows", type=COUNT, metavar="N",
        help="how many windows (default: all of the text)")
    add("--offset", type=between(int, 0, 2**31 - 1), default=0, metavar="N",
        help="windows to skip at the text's start (default: %(default)s)")
    add = parser.add_argument_group("sparsity").add_argument
    add_sparsities(add, [0, 0.25, 0.4, 0.5, 0.6])
    add_calibrations(add)
    add = parser.add_argument_group("results").add_argument
    add_json(add)
    add("--plot", metavar="FILE", help="draw perplexity against sparsity")
    args = parser.parse_args()
    for flag in ("calibration", "allocation"):
        if getattr(args, flag) and not any(args.sparsity):
            parser.error(f"--{flag} needs a --sparsity above 0")
    return args


def main():
    args = parse_args()
    model, tokenizer = load_model(args, alone="evaluating")
    if not 4 <= args.window <= model.config.context:
        raise ValueError(f"--window {args.window} is outside 4 to {model.config.context}, this "
                         "model's context")
    tokens = torch.tensor(tokenizer.encode(read_text(args.text)))
    windows = begin_with(tokenizer.bos_id, cut(tokens, args.window, args.offset, args.windows))

    measured = settings(model, args.sparsity, args.calibration, args.allocation)
    if args.json:  # a file that cannot be added to must fail now, not after the measurement
        require_rows(args.json, "perplexity")
    if args.plot:
        require_writable(args.plot, "--plot")
    rows, shares = [], byte_shares(model.config)
    results = evaluate(model, windows, [table for *_, table in measured])
    for (allocation, sparsity, source, table), result in zip(measured, results):
        dropped = result["sparsity"].mean(0)  # [7]: a projection has one size in all layers
        rows.append({
            "model": args.model or default_model.NAME, "weights": weights_digest(model),
            "dtype": args.dtype, "quantize": args.quantize, "text": Path(args.text).name,
            "tokens": digest(windows), "window": args.window, "offset": args.offset,
            "windows": len(windows), "thresholds": digest(table),
            "allocation": allocation, "calibrated_on": source, "sparsity": sparsity,
            "realised_sparsity": (dropped @ shares).item(), "perplexity": result["perplexity"],
            "kl": result["kl"], "top1": result["top1"],
            "projections": dict(zip(PROJECTIONS, dropped.tolist()))})
    print_table(rows)
    if args.json:
        earlier = require_rows(args.json, "perplexity")  # another run may have added to it
        write_rows(args.json, replaced(earlier, rows, IDENTITY))
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    run_script(main)
