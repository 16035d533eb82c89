"""What sparsity costs: perplexity of a text at a list of sparsities, next to the dense model on the same tokens.

The text is cut into windows. As in use, the first half of each is a dense prefill and the second half is read through
the thresholds; the second half's next tokens are scored (TEAL: Liu et al. 2024, arXiv:2408.14690, section 5.1). In
place of decoding token by token, that half goes through the model at once with every projection's input masked, which
is the same arithmetic: a token's mask depends on that token alone. Beside perplexity stand the sparsity that the
masks really reached, the mean KL divergence of the sparse predictions from the dense ones, and how often both name
the same next token.

    python evaluate.py --text wiki.test.raw --window 1024 --offset 40 --windows 8 --plot quality.png
    python evaluate.py --text wiki.test.raw --sparsity 0 0.5 --calibration mine.safetensors --json results.json
"""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import calibrate
from calibrate import byte_shares, masked, parts
from calibration import ALLOCATIONS, Calibration, candidates, weights_digest
from generate import make_parser
from model import PROJECTIONS, KVCache


@torch.no_grad()
def score(model, tokens, tables, all_sparse=False):
    """Score one window of token ids [T] under each table of thresholds, float32 [n_layers, 7], or None for dense.

    -> one dict a table: `nll` and `kl` in nats and `top1`, means over the positions of the second half; `sparsity`,
    float64 [n_layers, 7], the share of each projection's inputs dropped there. `all_sparse` masks the first half too.
    """
    half = len(tokens) // 2
    first, second, targets = tokens[:half], tokens[half:-1], tokens[half + 1:]
    cache = KVCache(model.config, len(tokens), model.dtype, model.device)
    model.forward(first, cache)
    dense = model.forward(second, cache)  # [T / 2, hidden_size]
    expected = model.logits(dense).float().log_softmax(-1)

    results = []
    for table in tables:
        hidden = dense
        dropped = torch.zeros(model.config.n_layers, len(PROJECTIONS), dtype=torch.float64, device=model.device)
        if table is not None:
            table = table.to(model.device)

            def project(x, p):
                return masked(x, p, table[p.layer, parts(p)], dropped[p.layer, parts(p)])

            cache.length = 0 if all_sparse else half
            if all_sparse:
                model.forward(first, cache, project)
                dropped.zero_()
            hidden = model.forward(second, cache, project)  # overwrites the dense keys and values of this half
        predicted = model.logits(hidden).float().log_softmax(-1)
        results.append({"nll": F.nll_loss(predicted, targets).item(),
                        "kl": F.kl_div(predicted, expected, log_target=True, reduction="sum").item() / len(targets),
                        "top1": (predicted.argmax(-1) == expected.argmax(-1)).double().mean().item(),
                        "sparsity": dropped.cpu()})
    return results


def evaluate(model, windows, thresholds, all_sparse=False):
    """`score`'s results for one table of thresholds, or None, as means over windows [n, T], and `perplexity`."""
    results = [score(model, tokens.to(model.device), [thresholds], all_sparse)[0] for tokens in windows]
    means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
    return {"perplexity": math.exp(means["nll"]), **means}


def cut(tokens, window, offset=0, n=None):
    """Windows number offset ... offset + n - 1 of a text's token ids -> [n, window]; without n, as many as there are.

    Raises ValueError if the text does not hold them all, or holds none.
    """
    held = len(tokens) // window
    n = max(1, held - offset) if n is None else n
    if offset < 0 or n < 1 or offset + n > held:
        raise ValueError(f"the text holds {held} windows of {window} tokens; windows {offset} to {offset + n - 1} "
                         "asked for; give a longer text or other --window, --offset, --windows")
    return tokens[offset * window:(offset + n) * window].view(n, window)


def find_calibrations(model, files, allocations):
    """{allocation: Calibration}: from the files given, else whatever is there for this model (its own first)."""
    found = {}
    for path in files:
        calibration = Calibration.load(path, model.config)
        allocation = calibration.metadata["allocation"]
        if allocation in found:
            raise ValueError(f"{path} is a second {allocation} calibration; give one file for each allocation")
        found[allocation] = calibration
    for calibration in () if files else candidates(model):
        found.setdefault(calibration.metadata["allocation"], calibration)
    for allocation in allocations or ():
        if allocation not in found:
            raise ValueError(f"there is no {allocation} calibration for this model; make one with calibrate.py "
                             f"--allocation {allocation} and name it with --calibration")
    if not found:
        raise ValueError("there is no calibration for this model; make one with calibrate.py")
    return {name: found[name] for name in allocations or found}


def new_row(allocation, sparsity, run):
    """A row of results over no windows yet; `add` makes its means grow. `run` identifies what is being measured."""
    return {"allocation": allocation, "sparsity": sparsity, "realised_sparsity": 0.0, "perplexity": 1.0, "kl": 0.0,
            "top1": 0.0, "projections": dict.fromkeys(PROJECTIONS, 0.0), "windows": 0, "run": run}


def resume(path, rows):
    """The rows, each as the JSON file at `path` holds it if it stems from the same run."""
    if path is None or not Path(path).exists():
        return rows
    try:
        old = {row["run"]: row for row in json.loads(Path(path).read_text()) if row.keys() == rows[0].keys()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} exists and holds no results of evaluate.py; name another file with --json") from None
    return [old.get(row["run"], row) for row in rows]


def add(row, result, shares):
    """Take one more window's result into the means of a row."""
    row["windows"] += 1

    def mean(old, new):
        return old + (float(new) - old) / row["windows"]

    sparsity = result["sparsity"].mean(0)  # [7]: a projection is equally large in every layer
    row["perplexity"] = math.exp(mean(math.log(row["perplexity"]), result["nll"]))
    row["kl"], row["top1"] = mean(row["kl"], result["kl"]), mean(row["top1"], result["top1"])
    row["realised_sparsity"] = mean(row["realised_sparsity"], sparsity @ shares)
    row["projections"] = {name: mean(row["projections"][name], s) for name, s in zip(PROJECTIONS, sparsity)}


def write_json(path, rows):
    """Write the rows whole or not at all: an interruption must not cost what was measured before it."""
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def print_table(rows):
    print(f"{'allocation':<11}{'sparsity':>9}{'realised':>9}{'perplexity':>11}{'KL':>8}{'top-1':>7}   realised "
          + " ".join(f"{name:>5}" for name in PROJECTIONS))
    for row in rows:
        print(f"{row['allocation']:<11}{row['sparsity']:>9.2f}{row['realised_sparsity']:>9.3f}"
              f"{row['perplexity']:>11.2f}{row['kl']:>8.4f}{row['top1']:>7.3f}            "
              + " ".join(f"{row['projections'][name]:>5.3f}" for name in PROJECTIONS))


def plot(path, rows):
    """Perplexity against realised sparsity, one line an allocation, all starting at the dense model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    start = [row for row in rows if row["sparsity"] == 0]
    for allocation in dict.fromkeys(row["allocation"] for row in rows if row["sparsity"] > 0):
        line = start + [row for row in rows if row["allocation"] == allocation]
        line.sort(key=lambda row: row["realised_sparsity"])
        x, y = zip(*[(row["realised_sparsity"], row["perplexity"]) for row in line])
        axes.plot(x, y, marker="o", label=allocation)
    for row in start:
        axes.axhline(row["perplexity"], color="grey", linewidth=0.8, linestyle=":", label="dense")
    axes.set(xlabel="sparsity reached", ylabel="perplexity", yscale="log")
    axes.yaxis.set_minor_formatter("{x:g}")  # 30, not 3 x 10^1
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_args():
    parser = make_parser(__doc__)
    calibrate.add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--text", metavar="FILE", required=True, help="UTF-8 file to score")
    add("--window", type=int, default=2048, metavar="N",
        help="tokens that see each other; the second half is scored (default: %(default)s)")
    add("--windows", type=int, metavar="N", help="how many windows (default: all of the text)")
    add("--offset", type=int, default=0, metavar="N", help="windows to skip at the text's start (default: %(default)s)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--sparsity", type=float, nargs="+", default=[0, 0.25, 0.4, 0.5, 0.6], metavar="S",
        help="0 to 0.95; 0 is dense (default: %(default)s)")
    add("--calibration", metavar="FILE", nargs="+", default=[],
        help="files of calibrate.py, one an allocation (default: those at hand for this model)")
    add("--allocation", nargs="+", choices=ALLOCATIONS, help="which of them to score (default: all that are at hand)")
    add("--all-sparse", action="store_true", help="make the first half of each window sparse too")
    add = parser.add_argument_group("results").add_argument
    add("--json", metavar="FILE", help="write them there as well; an interrupted run continues from it")
    add("--plot", metavar="FILE", help="draw perplexity against sparsity")
    return parser.parse_args()


def run(args):
    model, tokenizer = calibrate.load_model(args)
    if not 4 <= args.window <= model.config.context:
        raise ValueError(f"--window {args.window} is outside 4 to {model.config.context}, this model's context")
    tokens = torch.tensor(tokenizer.encode(Path(args.text).read_text(encoding="utf-8")))
    windows = cut(tokens, args.window, args.offset, args.windows)

    tasks = [("dense", 0.0, None)] if 0 in args.sparsity else []
    for name, calibration in find_calibrations(model, args.calibration, args.allocation).items():
        tasks += [(name, s, calibration.thresholds(s)) for s in sorted(set(args.sparsity)) if s != 0]
    settings = (weights_digest(model), args.dtype, model.quantize, args.window, args.all_sparse)
    rows = []
    for name, sparsity, table in tasks:
        measured = hashlib.sha256(repr((settings, name, sparsity)).encode() + windows.numpy().tobytes())
        if table is not None:
            measured.update(table.numpy().tobytes())
        rows.append(new_row(name, sparsity, measured.hexdigest()[:16]))
    rows = resume(args.json, rows)

    # Window by window, so that a window's dense reference is computed once for all rows.
    shares = byte_shares(model.config)
    for i, tokens in enumerate(tqdm(windows, "evaluating", unit="window", disable=None)):
        todo = [(row, table) for row, (_, _, table) in zip(rows, tasks) if row["windows"] == i]
        results = score(model, tokens.to(model.device), [table for _, table in todo], args.all_sparse) if todo else []
        for (row, _), result in zip(todo, results):
            add(row, result, shares)
        if args.json and todo:
            write_json(args.json, rows)
    print_table(rows)
    if args.plot:
        plot(args.plot, rows)


def main():
    args = parse_args()
    try:
        run(args)
    except (OSError, ValueError, ImportError, torch.OutOfMemoryError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted" + ("; the same command continues" if args.json else ""), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
