"""Which activations may be dropped: thresholds for every layer and projection, as a function of
the requested sparsity.

If |x[k]| <= t, the input x[k] of a projection is dropped, and row k of its weights is
skipped. The t that drops a share s of the inputs is the s-quantile of |x|. So one pass over some
text, counting |x| in histograms, gives t for every s. What is left to choose is how the projections
share the requested sparsity: uniform, greedy or fisher (calibrations/allocations.py). Last, the
thresholds are tried out together, and the table is shifted to the sparsities that they reach.

Method: Liu et al., "TEAL" (arXiv:2408.14690, sections 4.1-4.3).

    python calibrate.py --out calibration.safetensors
    python calibrate.py --model meta-llama/Llama-3.2-1B --text wiki.train.raw --allocation greedy
"""

import copy
from pathlib import Path

import torch

from calibrations.allocations import ALLOCATE, byte_shares, locate, n_passes, unseen
from calibrations.own_text import write_text
from calibrations.thresholds import (
    ALLOCATIONS,
    FORMAT,
    GRID,
    SINKS,
    Calibration,
    CalibrationError,
    cache_path,
    fingerprint,
    own_config,
)
from checkpoint.digest import weights_digest
from checkpoint.files import read_text, require_writable
from cli.command_line import COUNT, add_model_flags, between, load_model, make_parser, run_script
from cli.progress import progress
from model import PROJECTIONS, SITES, KVCache, dense, masked

BINS = 0x7F80  # the upper 16 bits of a float32 magnitude: one bin for each finite bfloat16
# bin i holds the magnitudes in [EDGES[i], EDGES[i + 1])
EDGES = (torch.arange(BINS + 1, dtype=torch.int32) << 16).view(torch.float32)
ANCHORS = (0.2, 0.4, 0.6, 0.8, 0.95)  # sparsities whose thresholds are tried out


# ---- histograms and quantiles of the activations -----------------------------------------------

@torch.no_grad()
def count(model, windows, update=unseen):
    """Histograms of |x| over windows [n, T] of tokens: int64 [n_layers, 7, BINS].

    Projections of one site read the same x, so their histograms are equal. Raises
    CalibrationError, naming layer and projections, for activations that are not finite or that
    no threshold could split.
    """
    shape = model.config.n_layers, len(PROJECTIONS), BINS
    counts = torch.zeros(shape, dtype=torch.int64, device=model.device)

    def record(x, linear):
        names = "/".join(SITES[linear.site])
        counts[linear.layer, linear.places] += histogram(
            x, f"layer {linear.layer}: the input of {names}")
        return dense(x, linear)

    for tokens in windows.to(model.device):
        model.forward(tokens, project=record)
        update(1)
    counts = counts.cpu()

    def fullest(linear):  # share of the fullest bin, but not of bin 0: all zeros may be dropped
        histogram = counts[linear.layer, linear.places.start]
        return histogram[1:].max() / histogram.sum()

    worst = max(model.linears(), key=fullest)
    if fullest(worst) > 0.05:
        raise CalibrationError(
            f"layer {worst.layer}: {fullest(worst):.0%} of the inputs of "
            f"{'/'.join(SITES[worst.site])} have the same magnitude, so that no threshold "
            "reaches most sparsities; check the weights")
    return counts


def histogram(x, name):
    """How many |x| of x [..., T, K] lie in each bin, int64 [BINS]; the first SINKS tokens do not
    count. Raises CalibrationError, beginning with `name`, for an x that is not finite."""
    bins = x[..., SINKS:, :].float().abs().view(torch.int32) >> 16
    counts = torch.bincount(bins.flatten(), minlength=BINS)
    if len(counts) > BINS:  # infinity and NaN have higher bits than any number
        raise CalibrationError(f"{name} is not finite; check the weights, or try float32")
    return counts


def quantile(counts, p):
    """The p-quantiles of histograms [..., BINS], p [..., P] in [0, 1] -> float32 [..., P]."""
    cumulative = counts.double().cumsum(-1)
    rank = p.double() * cumulative[..., -1:]
    i = torch.searchsorted(cumulative, rank).clamp(max=BINS - 1)  # the bin that holds the rank
    inside = counts.gather(-1, i)
    share = (rank - (cumulative.gather(-1, i) - inside)) / inside.clamp(min=1)  # below, in bin i
    return torch.lerp(EDGES[i], EDGES[i + 1], share.float())


def masked_and_counted(thresholds, dropped):
    """A `project` function: `masked` by thresholds [n_layers, 7] on the model's device.

    Each call adds the share of the inputs that it drops to `dropped`, float64 [n_layers, 7].
    """
    def project(x, linear):
        t = thresholds[linear.layer, linear.places]
        drop = x.float().abs() <= t[:, None, None]  # [projections, T, K]
        dropped[linear.layer, linear.places] += drop.double().mean((1, 2))
        return masked(x, linear, t)

    return project


# ---- making a calibration ----------------------------------------------------------------------

@torch.no_grad()
def second_half(model, first, second, tables):
    """Read a window as in use: its first half is a dense prefill, its second half is sparse.

    first, second: its halves, token ids
    tables:        thresholds float32 [n_layers, 7] to try in turn; None is dense
    Yields, for each table, the hidden states of the second half, and the share of each
    projection's inputs dropped there, float64 [n_layers, 7].
    """
    config, device = model.config, model.device
    cache = KVCache(config, len(first) + len(second), model.dtype, device)
    model.forward(first, cache)
    for table in tables:
        project = dense
        dropped = torch.zeros(config.n_layers, len(PROJECTIONS), dtype=torch.float64, device=device)
        if table is not None:
            project = masked_and_counted(table.to(device), dropped)
        cache.length = len(first)
        yield model.forward(second, cache, project), dropped.cpu()


def realised(model, windows, tables, update=unseen):
    """The share of inputs that each of `tables`, thresholds [n_layers, 7], drops in the second
    halves of windows [n, T], as float64 [n_layers, 7]."""
    sums = [0] * len(tables)
    for tokens in windows.to(model.device):
        passes = second_half(model, *tokens.tensor_split([len(tokens) // 2]), tables)
        sums = [so_far + dropped for so_far, (_, dropped) in zip(sums, passes)]
        update((1 + len(tables)) / 2)
    return [dropped / len(windows) for dropped in sums]


def correct(calibration, shares, measure):
    """The calibration with its targets shifted to what they really reach.

    Dropping inputs shrinks the activations that follow, so thresholds found on the dense model
    drop more than requested. `measure(tables)` gives the share that each projection drops, for
    each of a list of thresholds; `shares` of the bytes weigh them. The table is read where it
    reaches each target.
    """
    measured = measure([calibration.thresholds(anchor) for anchor in ANCHORS])
    measured = torch.stack([torch.zeros_like(measured[0]), *measured], -1)  # like the tables
    reached = (measured * shares[..., None]).flatten(end_dim=-2).sum(0)
    i, weight = locate(reached.cummax(0).values)
    anchors = torch.tensor((0.0, *ANCHORS), dtype=torch.float64)
    read_at = torch.lerp(anchors[i - 1], anchors[i], weight).tolist()
    table = torch.stack([calibration.at(calibration.table, s) for s in read_at], -1)
    sparsities = torch.lerp(measured[..., i - 1], measured[..., i], weight)
    return Calibration(table, sparsities.float(), calibration.metadata)


def check_window(window, config):
    """Raise CalibrationError for a window that holds no token that counts, or too many."""
    if not SINKS < window <= config.context:
        raise CalibrationError(
            f"a window of {window} tokens is outside {SINKS + 1} to {config.context}: the first "
            f"{SINKS} tokens do not count, and this model reads no more")


def calibrate(model, tokens, window=1024, allocation="fisher", source="", bos_id=None):
    """Calibrate a model on token ids int64 [n], cut into windows -> Calibration.

    bos_id: the token that takes the place of each window's first one, as it begins a text in use;
        None for a model whose texts have none
    Raises CalibrationError for too short a text, an impossible window or allocation, and for
    activations that are not finite.
    """
    check_window(window, model.config)
    if allocation not in ALLOCATIONS:
        raise CalibrationError(f"the allocation is {allocation!r}; expected one of "
                               f"{', '.join(ALLOCATIONS)}")
    n = len(tokens) // window
    if n == 0:
        raise CalibrationError(f"{len(tokens)} tokens do not fill one window of {window}; give "
                               "more text, more --tokens or a smaller --window")
    windows = begin_with(bos_id, tokens[:n * window].view(n, window))
    checked = windows[:4]
    passes = n + n_passes(allocation, n) + len(checked) * (1 + len(ANCHORS)) / 2
    with progress("calibrating", passes) as bar:
        counts = count(model, windows, bar.update)
        sparsities = ALLOCATE[allocation](
            model, windows, lambda p: quantile(counts, p), bar.update)
        metadata = {"format": FORMAT, "fingerprint": fingerprint(model.config),
                    "weights": weights_digest(model), "allocation": allocation,
                    "tokens": str(windows.numel()), "window": str(window), "source": source}
        calibration = Calibration(quantile(counts, sparsities), sparsities, metadata)
        shares = byte_shares(model.config).expand(model.config.n_layers, -1)
        return correct(calibration, shares / model.config.n_layers,
                       lambda tables: realised(model, checked, tables, bar.update))


def begin_with(bos_id, windows):
    """Windows [n, T] with this token, if any, in place of each one's first."""
    if bos_id is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = bos_id
    return windows


def calibrate_briefly(model, tokenizer):
    """Calibrate a model on at most 2048 tokens of calibrations/text.txt: prose, code and dialogue,
    written for this project. The Calibration will be kept, so no --context of this run counts."""
    model = copy.copy(model)
    model.set_context(own_config(model))
    file = Path(__file__).parent / "calibrations" / "text.txt"
    tokens = torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8"))[:2048])
    # Shorter windows drop too much later on: attention's outputs shrink with the context.
    window = min(1024, model.config.context, len(tokens) // 2)
    return calibrate(model, tokens, window, source="calibrations/text.txt", bos_id=tokenizer.bos_id)


# ---- any nn.Module -----------------------------------------------------------------------------

class ModuleCalibration:
    """Thresholds of the Linears of any `nn.Module`, by name."""

    def __init__(self, names, calibration):
        self.names, self.calibration = names, calibration

    def thresholds(self, sparsity):
        """{name: threshold} for a sparsity from 0 to 0.95 of these Linears together; 0 gives -1.
        Raises CalibrationError outside."""
        return dict(zip(self.names, self.calibration.thresholds(sparsity).tolist()))


@torch.no_grad()
def calibrate_module(module, batches, linears=None):
    """Thresholds for the Linears of any causal `nn.Module` -> ModuleCalibration.

    module(batch) is called with each of `batches`, a list of token ids int64 [B, T], best as
    long as the texts to come: attention's outputs shrink with the context. `linears` are the
    names of the Linears to count, by default those within a numbered list of layers: the LM head
    stands outside. The allocation is uniform: all Linears get the same sparsity. Raises
    CalibrationError for names that are no Linear and for inputs that are not finite or missing.
    """
    found = {name: linear for name, linear in module.named_modules()
             if isinstance(linear, torch.nn.Linear)}
    names = [name for name in found if any(part.isdigit() for part in name.split("."))]
    names = names if linears is None else list(linears)
    for name in names:
        if name not in found:
            raise CalibrationError(f"{name!r} is no Linear of this module; choose from "
                                   "module.named_modules()")
    if not names:
        raise CalibrationError("the module has no Linear in a list of layers; name some")
    counts = torch.zeros(len(names), BINS, dtype=torch.int64)

    def run(batches, look):
        """Call the module; look(i, x) sees Linear i's input first and may return another."""
        hooks = [found[name].register_forward_pre_hook(lambda _, args, i=i: look(i, args[0]))
                 for i, name in enumerate(names)]
        try:
            for batch in batches:
                module(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def record(i, x):
        counts[i] += histogram(x, f"the input of {names[i]}").cpu()

    def measure_one(thresholds):
        dropped, seen = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))

        def mask(i, x):  # As in use, a prompt is dense: the first half of the tokens.
            drop = x.float().abs() <= thresholds[i].item()
            drop[..., :x.shape[-2] // 2, :] = False
            dropped[i] += drop.sum().item()
            seen[i] += drop[..., x.shape[-2] // 2:, :].numel()
            return x.masked_fill(drop, 0)

        run(batches[:4], mask)
        return dropped / seen

    run(batches, record)
    for name, n in zip(names, counts.sum(-1)):
        if n == 0:
            raise CalibrationError(f"{name} saw nothing after the first {SINKS} tokens; give "
                                   "longer batches, or leave it out")
    sparsities = GRID.expand(len(names), -1)
    calibration = Calibration(quantile(counts, sparsities), sparsities, {"allocation": "uniform"})
    sizes = torch.tensor([found[name].weight.numel() for name in names], dtype=torch.float64)
    return ModuleCalibration(names, correct(
        calibration, sizes / sizes.sum(), lambda tables: list(map(measure_one, tables))))


# ---- the command line --------------------------------------------------------------------------

def main():
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--text", metavar="FILE",
        help="UTF-8 file to calibrate on (default: text that the model writes itself)")
    add("--tokens", type=COUNT, default=8192, metavar="N",
        help="how many, from the start (default: %(default)s)")
    add("--window", type=COUNT, default=1024, metavar="N",
        help="tokens that see each other (default: %(default)s)")
    add("--seed", type=between(int, 0, 2**63 - 1), metavar="N",
        help="of the self-written text (default: 0)")
    add = parser.add_argument_group("thresholds").add_argument
    add("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0],
        help="how layers and projections share out the sparsity (default: %(default)s)")
    add("--out", metavar="FILE", help="file to write (default: one in the user's cache)")
    args = parser.parse_args()
    if args.text and args.seed is not None:
        parser.error("--seed is of the self-written text; leave it out, or --text")
    model, tokenizer = load_model(args, alone="calibrating")
    check_window(args.window, model.config)
    out = args.out or cache_path(model)
    require_writable(out, "--out")
    if args.text is None:
        tokens = write_text(model, tokenizer, args.tokens, args.seed or 0)
        source = f"self-written, seed {args.seed or 0}"
    else:
        tokens = torch.tensor(tokenizer.encode(read_text(args.text))[:args.tokens])
        source = Path(args.text).name
    calibrate(model, tokens, args.window, args.allocation, source, tokenizer.bos_id).save(out)
    print(out)


if __name__ == "__main__":
    run_script(main)
