"""Which activations may be dropped: thresholds for every layer and projection, as a function of the sparsity asked for.

An input x[k] of a projection is dropped, and row k of its weights not read, when |x[k]| <= t. The threshold t that
drops a share s is the s-quantile of |x|, so one pass over some text, counting |x| in histograms at the four sites of
every block, gives t(s) for all s. What is left to choose is how the sparsity asked for is shared out. Three answers:
`uniform` gives every projection the same share; `greedy` raises, block by block, the projection that hurts the
block's output least (TEAL: Liu et al. 2024, arXiv:2408.14690, sections 4.1-4.3, whose rule and baselines these are);
`fisher` estimates from gradients what dropping costs the loss and spends one model-wide budget where it is cheapest.

    python calibrate.py --model M --text FILE --tokens 8192 --window 1024 --allocation fisher --out FILE
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import one_line
from model import PROJECTIONS, SITES, Config, KVCache, dense

FORMAT = "1"
ALLOCATIONS = ("fisher", "greedy", "uniform")  # best first
GRID = torch.arange(96) / 100  # the sparsities a calibration tabulates: 0, 0.01, ... 0.95
SINKS = 8  # first tokens of a window: attention sinks, whose huge activations would distort every statistic
BINS = 0x7F80  # a float32 magnitude cut to its upper 16 bits: one bin for each finite bfloat16 value
EDGES = (torch.arange(BINS + 1, dtype=torch.int32) << 16).view(torch.float32)  # bin i holds [EDGES[i], EDGES[i + 1])
STEP = 0.01  # of greedy, in shares of a block's bytes
MOST = 0.99  # the highest sparsity of one projection
PROMPTS = ("Tell me about the history of a city.", "Explain how an engine works.", "Write a short story.",
           "What have scientists found out about the sea?", "Describe the life of a famous musician.",
           "How do I cook a good soup?", "Write a function that sorts a list, and explain it.",
           "What should I know about money?")  # to which a chat model writes its own calibration text
FIRST = {site: PROJECTIONS.index(names[0]) for site, names in SITES.items()}  # a site's first index in PROJECTIONS
SITE_INDEX = {site: i for i, site in enumerate(SITES)}
SITE_OF = torch.tensor([i for i, names in enumerate(SITES.values()) for _ in names])  # of each projection [7]


class CalibrationError(ValueError):
    """A calibration cannot be made or used; the message is one sentence for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# The file: one small safetensors per model

def fingerprint(config):
    """What a calibration must share with a model: the numbers that fix its weights' shapes, as a JSON string.

    Not the context or the rotary settings (a longer-context release may use its parent's calibration), nor the
    architecture's name (GGUF files call a Mistral a Llama).
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "qkv_bias")
    return json.dumps({name: getattr(config, name) for name in names})


def weights_digest(model):
    """16 hex digits that tell fine-tunes of one architecture apart: of the final norm's weights, rounded to bfloat16."""
    norm = model.norm.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return hashlib.sha256(fingerprint(model.config).encode() + norm.tobytes()).hexdigest()[:16]


def cache_path(model):
    """Where this model's own calibration is kept on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nanoteal" / f"calibration-{weights_digest(model)}.safetensors"


class Calibration:
    """Thresholds and expected sparsities, float32 [n_layers, 7, 96]: layer, projection (order PROJECTIONS), GRID."""

    def __init__(self, thresholds, sparsities, metadata):
        self.table, self.sparsities, self.metadata = thresholds, sparsities, metadata

    def thresholds(self, sparsity):
        """Thresholds float32 [n_layers, 7] for a model-wide sparsity; -1 everywhere, exactly dense, for 0.

        Raises ValueError outside [0, 0.95].
        """
        return self.at(self.table, sparsity) if sparsity else torch.full(self.table.shape[:2], -1.0)

    def expected(self, sparsity):
        """About the share of each projection's inputs that `thresholds(sparsity)` drops, float32 [n_layers, 7]."""
        return self.at(self.sparsities, sparsity)

    def at(self, table, sparsity):
        """A table [n_layers, 7, 96] at one sparsity, linearly interpolated -> [n_layers, 7]."""
        if not 0 <= sparsity <= 0.95:
            raise CalibrationError(f"sparsity {sparsity} is out of range; choose a value from 0 to 0.95")
        position = sparsity * 100
        i = min(int(position), len(GRID) - 2)
        return torch.lerp(table[..., i], table[..., i + 1], position - i)

    def save(self, path):
        """Write the file whole or not at all; raises CalibrationError if that is not possible."""
        path = Path(path)
        tensors = {"sparsity_grid": GRID, "thresholds": self.table, "sparsities": self.sparsities}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                temporary = Path(folder) / path.name
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, self.metadata)
                os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write the calibration {path} ({one_line(error)})") from None

    @classmethod
    def load(cls, path, config):
        """Read a calibration of the model with this config; raises CalibrationError for anything else."""
        shapes = {name: (config.n_layers, len(PROJECTIONS), len(GRID)) for name in ("thresholds", "sparsities")}
        shapes["sparsity_grid"] = (len(GRID),)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CalibrationError(f"{path} is no calibration of format {FORMAT}; make one with calibrate.py")
                if metadata.get("fingerprint") != fingerprint(config):
                    raise CalibrationError(f"{path} belongs to another model ({str(metadata.get('fingerprint'))[:300]!r}); "
                                           "make one for this model with calibrate.py")
                for name, shape in shapes.items():
                    header = file.get_slice(name)
                    if header.get_dtype() != "F32" or tuple(header.get_shape()) != shape:
                        raise CalibrationError(f"{path}: tensor {name} is {header.get_dtype()} {header.get_shape()}, "
                                               f"expected F32 {list(shape)}; make the file anew with calibrate.py")
                tensors = {name: file.get_tensor(name).clone() for name in shapes}  # as read, they still are the file
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read calibration {path}: {one_line(error)}") from None
        table, sparsities = tensors["thresholds"], tensors["sparsities"]
        if not (table.isfinite().all() and (table >= 0).all() and (table.diff(dim=-1) >= 0).all()):
            raise CalibrationError(f"{path}: thresholds must be finite, not negative and not fall as sparsity grows; "
                                   "make the file anew with calibrate.py")
        if not (torch.equal(tensors["sparsity_grid"], GRID) and ((sparsities >= 0) & (sparsities <= 1)).all()):
            raise CalibrationError(f"{path}: sparsities must lie in [0, 1], on a grid of 0, 0.01 ... 0.95; "
                                   "make the file anew with calibrate.py")
        return cls(table, sparsities, metadata)


def candidates(model, folder=None):
    """Yield the calibrations at hand for this model, best first, each loaded when asked for.

    Its own come first, from `folder`/calibration.safetensors and from the user's cache; then those under calibrations/
    made for the same architecture numbers. Raises CalibrationError when one of them is not fit for use.
    """
    beside = [Path(folder) / "calibration.safetensors"] if folder else []
    for path in (*beside, cache_path(model)):
        if path.is_file():
            yield Calibration.load(path, model.config)
    shipped = []
    for path in sorted((Path(__file__).parent / "calibrations").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["fingerprint"] == fingerprint(model.config):
            shipped.append((ALLOCATIONS.index(metadata["allocation"]), path))
    for _, path in sorted(shipped):
        yield Calibration.load(path, model.config)


def find(model, path=None, folder=None):
    """The Calibration at `path`, else the best at hand (see `candidates`), else None.

    Raises CalibrationError if that file is not fit for use with this model.
    """
    return next(candidates(model, folder), None) if path is None else Calibration.load(path, model.config)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the activations

def masked(x, p, thresholds):
    """x [T, K] times projection p -> [T, N], each part i dropping the x with |x| <= thresholds[i]."""
    magnitude = x.float().abs()
    y = torch.cat([x.masked_fill(magnitude <= t, 0) @ p.weight(a, b, x.dtype)  # a NaN is kept, so it stays visible
                   for t, a, b in zip(thresholds, (0, *p.ends), p.ends)], -1)
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
        raise CalibrationError(f"layer {layer}: {crowd.max():.0%} of the inputs of {'/'.join(list(SITES.values())[site])} have "
                               "the same magnitude, so that no threshold reaches most sparsities; check the weights")
    return counts


def quantile(counts, p):
    """The p-quantiles of histograms: counts [..., BINS], p [..., P] in [0, 1] -> magnitudes float32 [..., P]."""
    cumulative = counts.double().cumsum(-1)
    rank = p.double() * cumulative[..., -1:]
    i = torch.searchsorted(cumulative, rank).clamp(max=BINS - 1)
    inside = counts.gather(-1, i)
    share = (rank - (cumulative.gather(-1, i) - inside)) / inside.clamp(min=1)  # of bin i that lies below
    return torch.lerp(EDGES[i], EDGES[i + 1], share.float())


@torch.no_grad()
def write_text(model, tokenizer, n_tokens, seed=0):
    """Token ids int64 [n_tokens] of text the model writes itself: dense sampling at temperature 1, without top-k or top-p.

    A chat model answers PROMPTS in turn, any other model continues its first token. A document ends where the model
    ends it, or after 512 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, min(512, model.config.context), model.dtype, model.device)
    starts = [[tokenizer.bos_id or min(tokenizer.eos_ids, default=0)]]
    if tokenizer.has_chat_template:
        starts = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    text = []
    with tqdm(total=n_tokens, desc="writing text", unit="token", disable=None) as bar:
        for start in itertools.cycle(starts):
            cache.length, new = 0, start[:cache.context]
            while True:
                text += new
                bar.update(len(new))
                if len(text) >= n_tokens:
                    return torch.tensor(text[:n_tokens])
                if cache.length + len(new) == cache.context or (cache.length and new[0] in tokenizer.eos_ids):
                    break
                hidden = model.forward(torch.tensor(new, device=model.device), cache)
                probabilities = model.logits(hidden[-1:])[0].float().softmax(-1).cpu()
                new = torch.multinomial(probabilities, 1, generator=generator).tolist()


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
    shares = byte_shares(model.config)
    rope, x = model.rope(0, len(tokens)), model.embed(tokens)
    sparsities = torch.zeros(model.config.n_layers, len(PROJECTIONS), len(GRID), dtype=torch.float64)

    for i, layer in enumerate(tqdm(model.layers, "greedy", unit="layer", disable=None)):
        y = model.block(layer, x, rope)

        def error(levels):
            thresholds = quantile(counts[i, SITE_OF], levels[:, None])[:, 0]
            sparse = model.block(layer, x, rope, project=lambda x, p: masked(x, p, thresholds[parts(p)]))
            return (sparse - y)[SINKS:].float().square().sum().item()

        path = [torch.zeros(len(PROJECTIONS), dtype=torch.float64)]
        while path[-1] @ shares < GRID[-1]:
            raised = (path[-1] + torch.diag(STEP / shares)).clamp(max=MOST)  # [7, 7]: row p raises projection p
            raised = raised[path[-1] < MOST]
            path.append(min(raised, key=error))
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
    """`dense` whose backward pass shows `record` x [T, K] and the gradients [T, K] of the loss at each part's own input."""

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
        x = checkpoint(model.block, layer, x, rope, None, project, use_reentrant=False)
    return F.rms_norm(x, (model.config.hidden_size,), model.norm, model.config.norm_eps)


def fisher(model, windows, counts):
    """Sparsities by what dropping inputs costs the loss, estimated from one backward pass over the windows.

    With g the gradient at a projection's input x, dropping the smallest share s of x changes the loss by the sum of
    -g[k] x[k] over the dropped k. The mean square of that over tokens, D(s), estimates (twice) the KL divergence from
    the dense model, to second order. `allocate` spends the budget by these curves.
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

    for tokens in tqdm(windows, "gradients", unit="window", disable=None):
        tokens = tokens.to(model.device)
        logits = model.logits(hidden_states(model, tokens, lambda x, p: Probe.apply(x, p, record)))
        F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum").backward()
    layer, projection = divmod(costs.sum(-1).flatten().argmax().item(), len(PROJECTIONS))  # NaN counts as the largest
    if not costs[layer, projection].isfinite().all():
        raise CalibrationError(f"layer {layer}: the gradient at the input of {PROJECTIONS[projection]} is not finite; try "
                               "--dtype float32")
    return allocate(costs.cpu(), levels, byte_shares(model.config))


def allocate(losses, levels, shares):
    """Spend the budget where it is cheapest: losses [n_layers, 7, S] at sparsities `levels` [S], increasing from 0,
    -> sparsities [n_layers, 7, 96].

    Minimises the sum of losses under shares . sparsities = target (averaged over layers), for every target of GRID.
    Each projection's losses are replaced by their lower convex hull, whose segments are then taken in the order of
    loss per byte; the last one is taken in part.
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
# The tables published with TEAL

# vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads of the models they are for
TEAL_MODELS = {
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32),
    "Llama-2-13B": (32000, 5120, 13824, 40, 40, 40),
    "Llama-2-70B": (32000, 8192, 28672, 80, 64, 8),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8),
    "Llama-3-70B": (128256, 8192, 28672, 80, 64, 8),
    "Mistral-7B": (32000, 4096, 14336, 32, 32, 8),
}
TEAL_NOTES = (
    "Tables made with Llama-3 serve Llama-3.1 too, whose weights have the same shapes. The release's "
    "default-path histograms of Llama-3-8B are copies of Llama-2-7B's; these thresholds come from the folder beside "
    "them, whose counts fit Llama-3-8B. The release's greedy search weighed k and v at 1/8 of q for every model, and "
    "could raise them beyond 1; its sparsities are cut at 0.95 and taken at the block sparsity they truly reach.")


def from_teal(path, allocation):
    """Convert tables published with TEAL, an .npz named after its model (magnitude_quantiles [n_layers, 4, 96] on
    sparsity_grid; greedy_sparsity [n_layers, 18, 7] on target_grid) -> Calibration, "uniform" or "greedy".
    """
    name = Path(path).stem
    if allocation == "fisher":
        raise CalibrationError("TEAL published tables for the allocations uniform and greedy, not fisher")
    if name not in TEAL_MODELS:
        raise CalibrationError(f"{path} is named after no model TEAL published; expected one of {', '.join(TEAL_MODELS)}")
    vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads = TEAL_MODELS[name]
    config = Config("llama", vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, hidden_size // n_heads)
    with np.load(path, allow_pickle=False) as file:
        quantiles = torch.from_numpy(file["magnitude_quantiles"])[:, SITE_OF]  # [n_layers, 7, 96]
        published = torch.from_numpy(file["greedy_sparsity"]).double().clamp(0, 0.95)  # [n_layers, 18, 7]
    if allocation == "uniform":
        sparsities = GRID.expand(n_layers, len(PROJECTIONS), -1)
    else:
        ends = torch.zeros_like(published[:, :1]), torch.full_like(published[:, :1], 0.95)
        sparsities = torch.stack([interpolate(path, byte_shares(config)) for path in torch.cat((ends[0], published, ends[1]), 1)])
    position = sparsities.double() * 100
    i = position.long().clamp(max=len(GRID) - 2)
    thresholds = torch.lerp(quantiles.gather(-1, i), quantiles.gather(-1, i + 1), (position - i).float())
    return Calibration(thresholds, sparsities.float(), {
        "format": FORMAT, "fingerprint": fingerprint(config), "allocation": allocation, "tokens": "unknown",
        "source": f"{name}: the tables released with TEAL's code, github.com/FasterDecoding/TEAL",
        "licence": "MIT License, Copyright (c) 2024 FasterDecoding", "notes": TEAL_NOTES})


# ---------------------------------------------------------------------------------------------------------------------
# Making one

@torch.no_grad()
def realised(model, windows, thresholds):
    """The share of each projection's inputs that thresholds [n_layers, 7] drop, float64 [n_layers, 7].

    As in use, the first half of each window is a dense prefill, and in the second half all thresholds are at work.
    """
    dropped = torch.zeros(thresholds.shape, dtype=torch.float64, device=model.device)
    thresholds = thresholds.to(model.device)

    def project(x, p):
        sparse, magnitude = thresholds[p.layer, parts(p)], x.float().abs()
        dropped[p.layer, parts(p)] += torch.stack([(magnitude <= t).double().mean() for t in sparse])
        return masked(x, p, sparse)

    for tokens in windows.to(model.device):
        cache, half = KVCache(model.config, len(tokens), model.dtype, model.device), len(tokens) // 2
        model.forward(tokens[:half], cache)
        model.forward(tokens[half:], cache, project)
    return dropped.cpu() / len(windows)


def correct(model, windows, calibration):
    """The calibration with its targets shifted to what they reach.

    Dropping inputs shrinks the activations behind them, so at high sparsity thresholds found on the dense model drop
    more than asked for. Here the share dropped is measured at a few targets and the table is read at the target that
    reaches the one asked for.
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
        raise CalibrationError(f"{len(tokens)} tokens do not fill one window of {window}; give more text, more --tokens or a "
                               "smaller --window")
    windows = tokens[:n * window].view(n, window)
    counts = count(model, windows)
    if allocation == "uniform":
        sparsities = GRID.expand(model.config.n_layers, len(PROJECTIONS), -1).clone()
    elif allocation == "greedy":
        sparsities = greedy(model, windows[0].to(model.device), counts)
    else:
        sparsities = fisher(model, windows, counts)
    calibration = Calibration(quantile(counts[:, SITE_OF], sparsities), sparsities, {
        "format": FORMAT, "fingerprint": fingerprint(model.config), "weights": weights_digest(model),
        "allocation": allocation, "tokens": str(windows.numel()), "window": str(window), "source": source})
    return correct(model, windows[:4], calibration)


def check_device(parser, device):
    """End the program with one sentence if a command line names a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter from a PyTorch without CUDA
        parser.error(f"device {device!r} is not available; try --device cpu")


def main():
    parser = argparse.ArgumentParser(description="Choose the thresholds of activation sparsity for a model.")
    parser.add_argument("--model", help="folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", help="UTF-8 file to calibrate on (default: text the model writes itself)")
    parser.add_argument("--tokens", type=int, default=8192, help="how many tokens of the text, from its start")
    parser.add_argument("--window", type=int, default=1024, help="tokens that see each other")
    parser.add_argument("--allocation", choices=ALLOCATIONS, default=ALLOCATIONS[0])
    parser.add_argument("--teal", metavar="FILE.npz", help="convert a table published with TEAL instead, for --out")
    parser.add_argument("--out", help="file to write (default: this model's place in the user's cache)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--quantize", choices=("int8",), help="calibrate the model with int8 weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the self-written text")
    args = parser.parse_args()
    check_device(parser, args.device)

    from checkpoint import load

    try:
        if args.teal is not None:
            if args.out is None:
                raise CalibrationError("--teal needs --out, the file to write")
            calibration, out = from_teal(args.teal, args.allocation), args.out
        else:
            model, tokenizer = load(args.model, dtype=getattr(torch, args.dtype), device=args.device, quantize=args.quantize)
            if not SINKS < args.window <= model.config.context:
                raise CalibrationError(f"--window {args.window} is outside {SINKS + 1} to {model.config.context}: the first "
                                       f"{SINKS} tokens do not count, and this model reads no more")
            if args.text is None:
                tokens, source = write_text(model, tokenizer, args.tokens, args.seed), f"self-written, seed {args.seed}"
            else:
                text = Path(args.text).read_text(encoding="utf-8")
                tokens, source = torch.tensor(tokenizer.encode(text)[:args.tokens]), Path(args.text).name
            calibration = calibrate(model, tokens, args.window, args.allocation, source)
            out = args.out or cache_path(model)
        calibration.save(out)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(out)


if __name__ == "__main__":
    main()
