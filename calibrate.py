"""Which activations may be dropped: thresholds for every layer and projection, as a function of the sparsity asked for.

An input x[k] of a projection is dropped, and row k of its weights not read, when |x[k]| <= t. The threshold t that
drops a share s is the s-quantile of |x|, so one pass over some text, counting |x| in histograms at the four sites of
every block, gives t(s) for all s. What is left to choose is how the sparsity asked for is shared out. Three answers:
`uniform` gives every projection the same share; `greedy` raises, block by block, the projection that hurts the
block's output least (TEAL: Liu et al. 2024, arXiv:2408.14690, sections 4.1-4.3, whose rule and baselines these are);
`fisher` spends one model-wide budget where, by gradients, dropping moves the predictions least.

    python calibrate.py --out calibration.safetensors
    python calibrate.py --model meta-llama/Llama-3.2-1B --text wiki.train.raw --tokens 16384 --allocation greedy
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import checkpoint as recompute
from tqdm import tqdm

import checkpoint
from calibration import (ALLOCATIONS, FORMAT, GRID, Calibration, CalibrationError, cache_path, fingerprint,
                         weights_digest)
from generate import Session, make_parser
from model import PROJECTIONS, SITES, KVCache, dense

SINKS = 8  # first tokens of a window: attention sinks, whose huge activations would distort every statistic
BINS = 0x7F80  # a float32 magnitude cut to its upper 16 bits: one bin for each finite bfloat16 value
EDGES = (torch.arange(BINS + 1, dtype=torch.int32) << 16).view(torch.float32)  # bin i holds [EDGES[i], EDGES[i + 1])
STEP = 0.01  # of greedy, in shares of a block's bytes
DRAWS = 2  # of fisher, labels for each position
MOST = 0.99  # the highest sparsity of one projection
PROMPTS = ("Tell me about the history of a city.", "Explain how an engine works.", "Write a short story.",
           "Write a Python function that sorts a list.", "What have scientists found out about the sea?",
           "Write a C program that computes a mean.", "Describe the life of a famous musician.",
           "Write a Java class for a bank account.", "How do I cook a good soup?", "What should I know about money?")
FIRST = {site: PROJECTIONS.index(names[0]) for site, names in SITES.items()}  # a site's first index in PROJECTIONS
SITE_INDEX = {site: i for i, site in enumerate(SITES)}
SITE_OF = torch.tensor([i for i, names in enumerate(SITES.values()) for _ in names])  # of each projection [7]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the activations

def masked(x, p, thresholds, dropped=None):
    """x [T, K] times projection p -> [T, N], each part i dropping the x with |x| <= thresholds[i].

    If `dropped` [parts] is given, the shares that this drops are added to it.
    """
    thresholds = torch.as_tensor(thresholds, device=x.device)[:, None, None]
    drop = x.float().abs() <= thresholds  # [parts, T, K]; a NaN is kept, so it stays visible
    if dropped is not None:
        dropped += drop.double().mean((1, 2))
    y = torch.cat([x @ p.weight(a, b, x.dtype) for x, a, b in zip(x.masked_fill(drop, 0), (0, *p.ends), p.ends)], -1)
    return y if p.bias is None else y + p.bias


def parts(p):
    """The places of a fused projection's parts in PROJECTIONS, as a slice."""
    return slice(FIRST[p.site], FIRST[p.site] + len(p.ends))


@torch.no_grad()
def count(model, windows):
    """Histograms of |x| over windows [n, T] of tokens: int64 [n_layers, 4 sites, BINS].

    Raises CalibrationError, naming layer and projection, where an activation is infinite or NaN.
    """
    counts = torch.zeros(model.config.n_layers, len(SITES), BINS, dtype=torch.int64, device=model.device)

    def record(x, p):
        bins = x[SINKS:].float().abs().view(torch.int32) >> 16
        total = torch.bincount(bins.flatten(), minlength=BINS)
        if len(total) > BINS:  # the exponent of infinity and NaN
            raise CalibrationError(f"layer {p.layer}: the input of {'/'.join(SITES[p.site])} is not finite; "
                                   "check the weights, or try --dtype float32")
        counts[p.layer, SITE_INDEX[p.site]] += total
        return dense(x, p)

    for tokens in tqdm(windows, "activations", unit="window", disable=None):
        model.forward(tokens.to(model.device), project=record)
    counts = counts.cpu()
    crowd = (counts[..., 1:].amax(-1) / counts.sum(-1)).flatten()  # the fullest bin of each histogram
    layer, site = divmod(crowd.argmax().item(), len(SITES))  # zeros are no obstacle: they may always be dropped
    if crowd.max() > 0.05:
        names = "/".join(list(SITES.values())[site])
        raise CalibrationError(f"layer {layer}: {crowd.max():.0%} of the inputs of {names} have the same magnitude, so "
                               "that no threshold reaches most sparsities; check the weights")
    return counts


def quantile(counts, p):
    """The p-quantiles of histograms: counts [..., BINS], p [..., P] in [0, 1] -> magnitudes float32 [..., P]."""
    cumulative = counts.double().cumsum(-1)
    rank = p.double() * cumulative[..., -1:]
    i = torch.searchsorted(cumulative, rank).clamp(max=BINS - 1)
    inside = counts.gather(-1, i)
    share = (rank - (cumulative.gather(-1, i) - inside)) / inside.clamp(min=1)  # of bin i that lies below
    return torch.lerp(EDGES[i], EDGES[i + 1], share.float())


def write_text(model, tokenizer, n_tokens, seed=0):
    """Token ids int64 [n_tokens] of text the model writes itself, dense, at temperature 1 without top-k or top-p.

    A chat model answers PROMPTS in turn, any other continues its first token; each time to its end or 512 tokens.
    """
    starts = [[tokenizer.bos_id or min(tokenizer.eos_ids, default=0)]]
    if tokenizer.has_chat_template:
        starts = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    context, text = min(512, model.config.context), []
    session = Session(model, temperature=1.0, seed=seed, stop=tokenizer.eos_ids, context=context)
    with tqdm(total=n_tokens, desc="writing text", unit="token", disable=None) as bar:
        for start in itertools.cycle(starts):
            for token in itertools.chain(start, session.generate(start[:context], context)):
                text.append(token)
                bar.update()
                if len(text) == n_tokens:
                    return torch.tensor(text)


# ---------------------------------------------------------------------------------------------------------------------
# Allocations: the sparsity of each projection, float32 [n_layers, 7, 96], for every target of GRID

def byte_shares(config):
    """Each projection's share of a block's weights, float64 [7]."""
    sizes = [config.shapes(site)[0] * width for site in SITES for width in config.shapes(site)[1]]
    return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


@torch.no_grad()
def greedy(model, tokens, counts):
    """TEAL's block-wise greedy allocation (its algorithm 1), on the dense model's inputs of every block.

    Starting at 0, the projection whose raise by STEP of the block's bytes adds least to the squared error of the
    block's output is raised, until the block is wholly sparse. Every block reaches every target.
    """
    shares, n_layers = byte_shares(model.config), model.config.n_layers
    raises = torch.arange(int(MOST / STEP) + 2)  # how often a projection was raised -> its sparsity [7, 100]
    levels = (raises * STEP / shares[:, None]).clamp(max=MOST)
    rope, x = model.rope(0, len(tokens)), model.embed(tokens)
    sparsities = torch.zeros(n_layers, len(PROJECTIONS), len(GRID), dtype=torch.float64)
    for i, layer in enumerate(tqdm(model.layers, "greedy", unit="layer", disable=None)):
        y, thresholds = model.block(layer, x, rope), quantile(counts[i, SITE_OF], levels)  # [7, 100]

        def error(t):
            sparse = model.block(layer, x, rope, project=lambda x, p: masked(x, p, t[parts(p)]))
            return (sparse - y)[SINKS:].float().square().sum()

        raised = torch.zeros(len(PROJECTIONS), dtype=torch.int64)
        path = [levels[:, 0]]
        while path[-1] @ shares < GRID[-1]:
            choices = raised + torch.eye(len(PROJECTIONS), dtype=torch.int64)[path[-1] < MOST]
            trials = thresholds.gather(1, choices.T).T.to(model.device)  # [choices, 7]
            raised = choices[torch.stack([error(t) for t in trials]).argmin().item()]
            path.append(levels.gather(1, raised[:, None])[:, 0])
        sparsities[i] = interpolate(torch.stack(path), shares)
        x = y
    return sparsities.float()


def interpolate(path, shares):
    """Sparsities [n, 7], growing from one row to the next, of one block -> those at each target of GRID, [7, 96]."""
    reached = path @ shares
    after = torch.searchsorted(reached, GRID.double()).clamp(1, len(path) - 1)
    weight = ((GRID - reached[after - 1]) / (reached[after] - reached[after - 1])).clamp(0, 1)
    return torch.lerp(path[after - 1], path[after], weight[:, None]).T


class Probe(torch.autograd.Function):
    """`dense` whose backward pass shows `record` x [T, K] and, of each part, the loss's gradient at x, [T, K]."""

    @staticmethod
    def forward(ctx, x, p, record):
        ctx.save_for_backward(x)
        ctx.p, ctx.record = p, record
        return dense(x, p)

    @staticmethod
    def backward(ctx, dy):
        (x,), p = ctx.saved_tensors, ctx.p
        gradients = [dy[:, a:b] @ p.weight(a, b, dy.dtype).T for a, b in zip((0, *p.ends), p.ends)]
        ctx.record(x, p, gradients)
        return sum(gradients), None, None


def hidden_states(model, tokens, project):
    """`model.forward` for a backward pass: each block keeps its input alone and runs again when its turn comes."""
    rope = model.rope(0, len(tokens))
    x = model.embed(tokens).requires_grad_()
    for layer in model.layers:
        x = recompute.checkpoint(model.block, layer, x, rope, None, project, use_reentrant=False)
    return F.rms_norm(x, (model.config.hidden_size,), model.norm, model.config.norm_eps)


def draw(logits, generator):
    """A token id for each row of logits [T, V], by its probabilities, int64 [T]; the generator is a CPU's."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    rank = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, rank)[:, 0].clamp(max=logits.shape[1] - 1)  # beyond the last one for a NaN


def fisher(model, windows, counts):
    """Sparsities by how far dropping inputs moves the predictions, estimated from backward passes over the windows.

    The loss is the cross-entropy of labels drawn from the predictions. With g its gradient at a projection's input x,
    dropping the smallest share s of x changes it by the sum of -g[k] x[k] over the dropped k. The mean square of that
    over tokens, D(s), a quadratic form of the Fisher information, is (twice) the KL divergence from the dense model to
    second order, were each token dropped alone. `allocate` spends the budget by these curves.
    """
    levels = torch.arange(20) / 20  # steps of 0.01 gave noisier hulls, and a worse perplexity
    edges = quantile(counts, levels.expand(*counts.shape[:2], -1)).to(model.device)  # [n_layers, 4, 20]
    costs = torch.zeros(model.config.n_layers, len(PROJECTIONS), len(levels), device=model.device)

    def record(x, p, gradients):
        level = torch.bucketize(x[SINKS:].float().abs(), edges[p.layer, SITE_INDEX[p.site]])  # from which x is dropped
        for cost, g in zip(costs[p.layer, parts(p)], gradients):
            effect = torch.zeros(len(level), len(levels) + 1, device=x.device)
            effect.scatter_add_(1, level, g[SINKS:].float() * x[SINKS:].float())
            cost += effect.cumsum(1)[:, :-1].square().sum(0)

    generator = torch.Generator().manual_seed(0)
    for tokens in tqdm(windows.repeat_interleave(DRAWS, 0), "gradients", unit="pass", disable=None):
        logits = model.logits(hidden_states(model, tokens.to(model.device), lambda x, p: Probe.apply(x, p, record)))
        F.cross_entropy(logits.float(), draw(logits.detach(), generator), reduction="sum").backward()
    layer, projection = divmod(costs.sum(-1).flatten().argmax().item(), len(PROJECTIONS))  # NaN counts as the largest
    if not costs[layer, projection].isfinite().all():
        raise CalibrationError(f"layer {layer}: the gradient at the input of {PROJECTIONS[projection]} is not finite; "
                               "try --dtype float32")
    return allocate(costs.cpu(), levels, byte_shares(model.config))


def allocate(losses, levels, shares):
    """Losses [n_layers, 7, S] at sparsities `levels` [S], increasing from 0 -> sparsities [n_layers, 7, 96].

    Minimises the sum of losses under shares . sparsities = target (averaged over layers), for every target of GRID.
    Each projection's losses become their lower convex hull, whose segments are taken in the order of loss per byte.
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
            segments += [(slope(a, b) / share, layer, projection, b[0] - a[0], (b[0] - a[0]) * share)
                         for a, b in zip(hull, hull[1:])]
    segments.sort()
    sparsities = torch.zeros(n_layers, len(PROJECTIONS), len(GRID), dtype=torch.float64)
    budget = GRID.double()  # what is left to spend at each target
    for _, layer, projection, length, cost in segments:
        taken = (budget / cost).clamp(0, 1)
        sparsities[layer, projection] += taken * length
        budget = budget - taken * cost
    return sparsities.float()


def slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])


# ---------------------------------------------------------------------------------------------------------------------
# Making one

@torch.no_grad()
def realised(model, windows, thresholds):
    """The share of each projection's inputs that thresholds [n_layers, 7] drop, float64 [n_layers, 7].

    As in use, the first half of each window is a dense prefill, and in the second half all thresholds are at work.
    """
    thresholds = thresholds.to(model.device)
    dropped = torch.zeros_like(thresholds, dtype=torch.float64)
    for tokens in windows.to(model.device):
        cache, half = KVCache(model.config, len(tokens), model.dtype, model.device), len(tokens) // 2
        model.forward(tokens[:half], cache)
        model.forward(tokens[half:], cache, lambda x, p: masked(
            x, p, thresholds[p.layer, parts(p)], dropped[p.layer, parts(p)]))
    return dropped.cpu() / len(windows)


def correct(model, windows, calibration):
    """The calibration with its targets shifted to what they reach.

    Dropping inputs shrinks the activations behind them, so at high sparsity thresholds found on the dense model drop
    more than asked for. So the share dropped is measured at a few targets, and the table read where it reaches each.
    """
    shares, anchors = byte_shares(model.config), (0.2, 0.4, 0.6, 0.8, 0.95)
    measured = [torch.zeros(calibration.table.shape[:2], dtype=torch.float64)]
    for anchor in tqdm(anchors, "checking", unit="target", disable=None):
        measured.append(realised(model, windows, calibration.thresholds(anchor)))
    measured = torch.stack(measured)  # [6, n_layers, 7]
    reached = (measured.mean(1) @ shares).cummax(0).values
    anchors = torch.tensor((0.0, *anchors), dtype=torch.float64)
    after = torch.searchsorted(reached, GRID.double()).clamp(1, len(anchors) - 1)
    weight = ((GRID - reached[after - 1]) / (reached[after] - reached[after - 1])).clamp(0, 1)
    read_at = torch.lerp(anchors[after - 1], anchors[after], weight).tolist()
    table = torch.stack([calibration.at(calibration.table, sparsity) for sparsity in read_at], -1)
    sparsities = torch.lerp(measured[after - 1], measured[after], weight[:, None, None]).permute(1, 2, 0)
    return Calibration(table, sparsities.float(), calibration.metadata)


def calibrate(model, tokens, window=1024, allocation="fisher", source=""):
    """Calibrate a model on token ids int64 [n], cut into windows -> Calibration.

    Raises CalibrationError for too short a text and for activations that are not finite.
    """
    n = len(tokens) // window
    if n == 0:
        raise CalibrationError(f"{len(tokens)} tokens do not fill one window of {window}; give more text, more "
                               "--tokens or a smaller --window")
    windows = tokens[:n * window].view(n, window)
    counts = count(model, windows)
    sparsities = GRID.expand(model.config.n_layers, len(PROJECTIONS), -1).clone()  # uniform
    if allocation == "greedy":
        sparsities = greedy(model, windows[0].to(model.device), counts)
    elif allocation == "fisher":
        sparsities = fisher(model, windows, counts)
    calibration = Calibration(quantile(counts[:, SITE_OF], sparsities), sparsities, {
        "format": FORMAT, "fingerprint": fingerprint(model.config), "weights": weights_digest(model),
        "allocation": allocation, "tokens": str(windows.numel()), "window": str(window), "source": source})
    return correct(model, windows[:4], calibration)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def add_model_flags(parser):
    """Add the flags that choose and load a model."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="M", help="Hugging Face folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and arithmetic (default: %(default)s)")
    add("--quantize", choices=("int8",), help="hold the weights as int8")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def load_model(args):
    """What add_model_flags' flags name -> (Model, Tokenizer)."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):  # the latter from a PyTorch without CUDA
        raise ValueError(f"device {args.device!r} is not available; try --device cpu") from None
    return checkpoint.load(args.model, dtype=getattr(torch, args.dtype), device=args.device, quantize=args.quantize)


def parse_args():
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--text", metavar="FILE", help="UTF-8 file to calibrate on (default: text the model writes itself)")
    add("--tokens", type=int, default=8192, metavar="N", help="how many, from the start (default: %(default)s)")
    add("--window", type=int, default=1024, metavar="N", help="tokens that see each other (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the self-written text (default: %(default)s)")
    add = parser.add_argument_group("thresholds").add_argument
    add("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0],
        help="how the sparsity is shared out among layers and projections (default: %(default)s)")
    add("--out", metavar="FILE", help="file to write (default: this model's place in the user's cache)")
    return parser.parse_args()


def run(args):
    model, tokenizer = load_model(args)
    if not SINKS < args.window <= model.config.context:
        raise CalibrationError(f"--window {args.window} is outside {SINKS + 1} to {model.config.context}: the first "
                               f"{SINKS} tokens do not count, and this model reads no more")
    if args.text is None:
        tokens, source = write_text(model, tokenizer, args.tokens, args.seed), f"self-written, seed {args.seed}"
    else:
        text = Path(args.text).read_text(encoding="utf-8")
        tokens, source = torch.tensor(tokenizer.encode(text)[:args.tokens]), Path(args.text).name
    out = args.out or cache_path(model)
    calibrate(model, tokens, args.window, args.allocation, source).save(out)
    print(out)


def main():
    try:
        run(parse_args())
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"calibrate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
