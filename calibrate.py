"""Which activations may be dropped: thresholds for every layer and projection, as a function of
the requested sparsity.

If |x[k]| <= t, the input x[k] of a projection is dropped, and row k of its weights is
skipped. The t that drops a share s of the inputs is the s-quantile of |x|. So one pass over some
text, counting |x| in histograms, gives t for every s. What is left to choose is the allocation:
how the projections share the requested sparsity. There are three:

    uniform  Every projection gets the same share.
    greedy   Each block raises, step by step, the projection that hurts the block's output least.
             This is TEAL's rule (Liu et al. 2024, arXiv:2408.14690, sections 4.1-4.3).
    fisher   One budget for the whole model is spent where dropping moves the predictions least,
             judged by gradients.

    python calibrate.py --out calibration.safetensors
    python calibrate.py --model meta-llama/Llama-3.2-1B --text wiki.train.raw --allocation greedy
"""

import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from calibrations.thresholds import (
    ALLOCATIONS,
    BRIEF,
    FORMAT,
    GRID,
    Calibration,
    CalibrationError,
    cache_path,
    fingerprint,
)
from checkpoint.digest import weights_digest
from checkpoint.files import read_text, require_writable
from cli.command_line import add_model_flags, load_model, make_parser, number, run_script
from cli.progress import Progress
from model import PROJECTIONS, SITES, KVCache, dense, masked, rms_norm
from session import Session
from tensor_parallel import refuse

SINKS = 8  # a window's first tokens draw attention and have huge activations: they do not count
BINS = 0x7F80  # the upper 16 bits of a float32 magnitude: one bin for each finite bfloat16
# bin i holds the magnitudes in [EDGES[i], EDGES[i + 1])
EDGES = (torch.arange(BINS + 1, dtype=torch.int32) << 16).view(torch.float32)
STEP = 0.01  # Greedy raises one projection by this share of the block's bytes at a time.
DRAWS = 2  # Fisher draws so many labels for each position.
MOST = 0.99  # the highest sparsity of one projection
ANCHORS = (0.2, 0.4, 0.6, 0.8, 0.95)  # sparsities whose thresholds are tried out
GREEDY_PASSES = round(GRID[-1].item() / STEP) * len(PROJECTIONS)  # trials of each block, about
PROMPTS = (
    "Tell me about the history of a city.", "Explain how an engine works.",
    "Write a short story.", "Write a Python function that sorts a list.",
    "What have scientists found out about the sea?", "Write a C program that computes a mean.",
    "Describe the life of a famous musician.", "Write a Java class for a bank account.",
    "How do I cook a good soup?", "What should I know about money?")


def write_text(model, tokenizer, n_tokens, seed=0):
    """Token ids int64 [n_tokens] of text that the model writes itself, dense, at temperature 1.

    A chat model answers PROMPTS in turn. Any other model continues its first token. Every text
    goes on to its end or to 512 tokens.
    """
    bos_id, eos_ids = tokenizer.bos_id, tokenizer.eos_ids
    starts = [[min(eos_ids, default=0) if bos_id is None else bos_id]]
    if tokenizer.has_chat_template:
        starts = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    context, text = min(512, model.config.context), []
    session = Session(model, temperature=1.0, seed=seed, stop=eos_ids, context=context)
    with Progress("writing text", n_tokens) as progress:
        for start in itertools.cycle(starts):
            for token in itertools.chain(start, session.generate(start[:context], context)):
                text.append(token)
                progress.update(1)
                if len(text) == n_tokens:
                    return torch.tensor(text)


# ---- statistics of the activations -------------------------------------------------------------

def unseen(passes):
    """An `update` that shows nothing: it is told how many passes over a window are done."""


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


# ---- allocations: sparsities float32 [n_layers, 7, 96], for every target of GRID ---------------

def byte_shares(config):
    """Each projection's share of a block's weights, float64 [7]."""
    shapes = [config.linear_shape(site) for site in SITES]
    sizes = [in_features * width for in_features, widths in shapes for width in widths]
    return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


def locate(reached):
    """Where GRID's targets lie among growing sparsities [n] -> (i, w), int64 and float64 [96]:
    between entries i - 1 and i, at weight w."""
    i = torch.searchsorted(reached, GRID.double()).clamp(1, len(reached) - 1)
    return i, ((GRID - reached[i - 1]) / (reached[i] - reached[i - 1])).clamp(0, 1)


def interpolate(path, shares):
    """Growing sparsities [n, 7] of one block -> those at GRID's targets, [7, 96]."""
    i, weight = locate(path @ shares)
    return torch.lerp(path[i - 1], path[i], weight[:, None]).T


@torch.no_grad()
def greedy(model, tokens, counts, update=unseen):
    """TEAL's greedy allocation (its algorithm 1). Every block reaches every target by itself.

    All projections start at 0. Each turn raises the one that adds least to the squared error of
    the block's output. The block's input is the dense model's, for token ids [T].
    """
    shares, n = byte_shares(model.config), len(PROJECTIONS)
    raises = torch.arange(int(MOST / STEP) + 2)
    levels = (raises * STEP / shares[:, None]).clamp(max=MOST)  # sparsity by raises, [7, 101]
    rope, x = model.rope(0, len(tokens)), model.embed(tokens)
    sparsities = torch.zeros(len(model.blocks), n, len(GRID), dtype=torch.float64)
    for block in model.blocks:
        y, thresholds = block(x, rope), quantile(counts[block.i], levels)  # [7, 101]

        def error(t):
            sparse = block(x, rope, project=lambda x, linear: masked(x, linear, t[linear.places]))
            return (sparse - y)[SINKS:].float().square().sum()

        raised = torch.zeros(n, dtype=torch.int64)
        path = [levels[:, 0]]
        while path[-1] @ shares < GRID[-1]:
            choices = raised + torch.eye(n, dtype=torch.int64)[path[-1] < MOST]
            trials = thresholds.gather(1, choices.T).T.to(model.device)  # [choices, 7]
            raised = choices[torch.stack([error(t) for t in trials]).argmin().item()]
            path.append(levels.gather(1, raised[:, None])[:, 0])
        sparsities[block.i] = interpolate(torch.stack(path), shares)
        x = y
        update(GREEDY_PASSES / len(model.blocks))
    return sparsities.float()


def fisher(model, windows, counts, update=unseen):
    """Sparsities by how far dropping inputs moves the predictions, from backward passes over
    windows [n, T].

    The loss is the cross-entropy of labels drawn from the predictions themselves. Let g be its
    gradient at a projection's input x. Dropping the smallest share s of x changes the loss by the
    sum of -g[k] x[k] over the dropped k. The mean square of that over the tokens, D(s), is a
    quadratic form of the Fisher information: to second order, twice the KL divergence from the
    dense model if only one token drops its inputs. `allocate` spends the budget by these curves.
    """
    levels = torch.arange(20) / 20  # steps of 0.01 gave noisier curves and a worse perplexity
    edges = quantile(counts, levels.expand(*counts.shape[:2], -1)).to(model.device)  # [L, 7, 20]
    costs = torch.zeros_like(edges)

    def watch(x, linear):
        x = x[SINKS:].float()
        level = torch.bucketize(x.abs(), edges[linear.layer, linear.places.start])  # that drops x

        def record(gradients):
            for cost, g in zip(costs[linear.layer, linear.places], gradients):
                effect = torch.zeros(len(level), len(levels) + 1, device=x.device)
                effect.scatter_add_(1, level, g[SINKS:].float() * x)
                cost += effect.cumsum(1)[:, :-1].square().sum(0)

        return record

    generator = torch.Generator().manual_seed(0)
    for tokens in windows.to(model.device):
        backward(model, tokens, lambda logits: draw(logits, generator), watch, update)
    worst = costs.sum(-1).flatten().argmax().item()  # NaN counts as the largest
    layer, place = divmod(worst, len(PROJECTIONS))
    if not costs[layer, place].isfinite().all():
        raise CalibrationError(f"layer {layer}: the gradient at the input of "
                               f"{PROJECTIONS[place]} is not finite; try --dtype float32")
    return allocate(costs.cpu(), levels, byte_shares(model.config))


class Probe(torch.autograd.Function):
    """`dense`, with two looks: watch(x, linear) returns a function, which every backward pass
    calls with a list: for each projection, the loss's gradient at its input x, [T, K] like x."""

    @staticmethod
    def forward(ctx, x, linear, watch):
        ctx.linear, ctx.record = linear, watch(x, linear)
        return dense(x, linear)

    @staticmethod
    def backward(ctx, dy):
        linear = ctx.linear
        gradients = [dy[:, start:end] @ linear.weight(start, end).T
                     for start, end in zip(linear.starts, linear.ends)]
        ctx.record(gradients)
        return sum(gradients), None, None


def backward(model, tokens, draw_labels, watch, update=unseen):
    """One forward pass over token ids [T] and DRAWS backward passes, watched (see Probe), each
    with the cross-entropy of other labels: draw_labels(logits [T, V]) -> int64 [T].

    To save memory, the forward pass keeps only the blocks' inputs. Each block runs once more when
    the backward passes reach it.
    """
    def project(x, linear):
        return Probe.apply(x, linear, watch)

    rope, inputs = model.rope(0, len(tokens)), [model.embed(tokens)]
    with torch.no_grad():
        for block in model.blocks:
            inputs.append(block(inputs[-1], rope))
    update(1)
    x = inputs.pop().requires_grad_()
    logits = model.logits(rms_norm(x, model.norm, model.config.norm_eps)).float()
    losses = [F.cross_entropy(logits, draw_labels(logits.detach()), reduction="sum")
              for _ in range(DRAWS)]
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    for block in reversed(model.blocks):
        x = inputs.pop().requires_grad_()
        y = block(x, rope, project=project)
        gradients = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in gradients]
        update((1 + 2 * DRAWS) / len(model.blocks))  # backward takes twice as long as forward


def draw(logits, generator):
    """Logits [T, V] -> int64 [T], a token id for each row, drawn by its probabilities. The
    generator is a CPU's, so that every device draws the same."""
    cumulative = logits.softmax(-1).cumsum(-1)
    rank = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, rank)[:, 0]
    return ids.clamp(max=logits.shape[1] - 1)  # NaN lands after the last one


def allocate(losses, levels, shares):
    """Losses [n_layers, 7, S] at sparsities `levels` [S] -> sparsities [n_layers, 7, 96].

    The sum of the losses is minimal for every target of GRID, which shares . sparsities, averaged
    over the layers, must meet. To find it, each projection's losses become their lower convex
    hull, and the hulls' segments are taken in the order of loss per byte.
    """
    n_layers, levels = len(losses), levels.tolist()
    segments = []  # (loss per byte, layer, projection, length, bytes)
    for layer, rows in enumerate(losses.tolist()):
        for projection, row in enumerate(rows):
            hull = []
            for point in zip(levels, row):
                while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
                    hull.pop()
                hull.append(point)
            share = shares[projection].item() / n_layers
            for a, b in zip(hull, hull[1:]):
                length = b[0] - a[0]
                segments.append((slope(a, b) / share, layer, projection, length, length * share))
    sparsities = torch.zeros(n_layers, len(PROJECTIONS), len(GRID), dtype=torch.float64)
    budget = GRID.double()  # what is left to spend at each target
    for _, layer, projection, length, cost in sorted(segments):
        taken = (budget / cost).clamp(0, 1)
        sparsities[layer, projection] += taken * length
        budget = budget - taken * cost
    return sparsities.float()


def slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])


# ---- making a calibration ----------------------------------------------------------------------

@torch.no_grad()
def realised(model, windows, tables, update=unseen):
    """The share of inputs that each of `tables`, thresholds [n_layers, 7], drops in windows
    [n, T], as float64 [n_layers, 7].

    As in use, the first half of each window is a dense prefill. In the second half all thresholds
    are at work.
    """
    tables = [table.to(model.device) for table in tables]
    dropped = [torch.zeros_like(table, dtype=torch.float64) for table in tables]
    for tokens in windows.to(model.device):
        cache = KVCache(model.config, len(tokens), model.dtype, model.device)
        first, second = tokens.tensor_split([len(tokens) // 2])
        model.forward(first, cache)
        for table, sums in zip(tables, dropped):
            cache.length = len(first)
            model.forward(second, cache, masked_and_counted(table, sums))
        update((1 + len(tables)) / 2)
    return [sums.cpu() / len(windows) for sums in dropped]


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
    passes = n + {"uniform": 0, "greedy": GREEDY_PASSES, "fisher": n * (2 + 2 * DRAWS)}[allocation]
    passes += len(checked) * (1 + len(ANCHORS)) / 2
    with Progress("calibrating", passes) as progress:
        counts = count(model, windows, progress.update)
        if allocation == "greedy":
            sparsities = greedy(model, windows[0].to(model.device), counts, progress.update)
        elif allocation == "fisher":
            sparsities = fisher(model, windows, counts, progress.update)
        else:
            sparsities = GRID.expand(model.config.n_layers, len(PROJECTIONS), -1)
        metadata = {"format": FORMAT, "fingerprint": fingerprint(model.config),
                    "weights": weights_digest(model), "allocation": allocation,
                    "tokens": str(windows.numel()), "window": str(window), "source": source,
                    "context": str(model.config.context)}
        calibration = Calibration(quantile(counts, sparsities), sparsities, metadata)
        shares = byte_shares(model.config).expand(model.config.n_layers, -1)
        return correct(calibration, shares / model.config.n_layers,
                       lambda tables: realised(model, checked, tables, progress.update))


def begin_with(bos_id, windows):
    """Windows [n, T] with this token, if any, in the place of each one's first."""
    if bos_id is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = bos_id
    return windows


def calibrate_briefly(model, tokenizer):
    """Calibrate a model on at most 2048 tokens of calibrations/text.txt: prose, code and
    dialogue, written for this project -> Calibration.

    It will be kept. So the model reads as it was made to, whatever context this run asked for.
    """
    model = copy.copy(model)
    model.set_context(model.own_config)
    file = Path(__file__).parent / "calibrations" / "text.txt"
    tokens = torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8"))[:2048])
    # Shorter windows drop too much later on: attention's outputs shrink with the context.
    window = min(1024, model.config.context, len(tokens) // 2)
    return calibrate(model, tokens, window, source=BRIEF, bos_id=tokenizer.bos_id)


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
    many = 2**31 - 1
    add = parser.add_argument_group("text").add_argument
    add("--text", metavar="FILE",
        help="UTF-8 file to calibrate on (default: text that the model writes itself)")
    add("--tokens", type=number(int, 1, many), default=8192, metavar="N",
        help="how many, from the start (default: %(default)s)")
    add("--window", type=number(int, 1, many), default=1024, metavar="N",
        help="tokens that see each other (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="of the self-written text (default: 0)")
    add = parser.add_argument_group("thresholds").add_argument
    add("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0],
        help="how layers and projections share out the sparsity (default: %(default)s)")
    add("--out", metavar="FILE", help="file to write (default: one in the user's cache)")
    args = parser.parse_args()
    if args.text and args.seed is not None:
        parser.error("--seed is of the self-written text; leave it out, or --text")
    refuse("calibrating")
    model, tokenizer = load_model(args)
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
