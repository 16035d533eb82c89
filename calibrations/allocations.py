"""How the projections share the requested sparsity.

A target of, say, 50% applies to all weights of the blocks together. Some projections tolerate more
sparsity than others. Three allocations decide how much each of them drops:

    uniform  Every projection gets the same share.
    greedy   Each block raises, step by step, the projection that hurts the block's output least.
             This is TEAL's rule (Liu et al. 2024, arXiv:2408.14690, section 4.3).
    fisher   One budget for the whole model is spent where dropping moves the predictions least,
             judged by gradients.

Each takes the same arguments and returns sparsities, float32 [n_layers, 7, 96], for every target
of GRID:

    model:     a Model
    windows:   token ids int64 [n, T]
    quantiles: a function of sparsities [n_layers, 7, P] -> the thresholds that reach them
    update:    called with the number of passes over a window just done
"""

import torch
import torch.nn.functional as F

from calibrations.thresholds import GRID, SINKS, CalibrationError
from model import PROJECTIONS, SITES, dense, masked, rms_norm

STEP = 0.01  # Greedy raises one projection by this share of the block's bytes at a time.
DRAWS = 2  # Fisher draws so many labels for each position.
MOST = 0.99  # the highest sparsity of one projection
GREEDY_PASSES = round(GRID[-1].item() / STEP) * len(PROJECTIONS)  # trials of each block, about


def unseen(passes):
    """An `update` that shows nothing."""


def byte_shares(config):
    """Each projection's share of a block's weights, float64 [7]."""
    shapes = [config.linear_shape(site) for site in SITES]
    sizes = [in_features * width for in_features, widths in shapes for width in widths]
    return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


def uniform(model, windows, quantiles, update=unseen):
    """Every projection drops the requested share."""
    return GRID.expand(model.config.n_layers, len(PROJECTIONS), -1)


# ---- greedy ------------------------------------------------------------------------------------

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
def greedy(model, windows, quantiles, update=unseen):
    """TEAL's greedy allocation (its algorithm 1). Every block reaches every target on its own.

    All projections start at 0. Each turn raises the one that adds least to the squared error of
    the block's output. The block's input is the dense model's, for the first of the windows.
    """
    shares, n = byte_shares(model.config), len(PROJECTIONS)
    tokens = windows[0].to(model.device)
    raises = torch.arange(int(MOST / STEP) + 2)
    levels = (raises * STEP / shares[:, None]).clamp(max=MOST)  # sparsity by raises, [7, 101]
    rope, x = model.rope(0, len(tokens)), model.embed(tokens)
    sparsities = torch.zeros(len(model.blocks), n, len(GRID), dtype=torch.float64)
    tables = quantiles(levels.expand(len(model.blocks), -1, -1))  # [n_layers, 7, 101]
    for block, thresholds in zip(model.blocks, tables):
        y = block(x, rope)

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


# ---- fisher ------------------------------------------------------------------------------------

def fisher(model, windows, quantiles, update=unseen):
    """Sparsities by how far dropping inputs moves the predictions, from backward passes.

    The loss is the cross-entropy of labels drawn from the predictions themselves. Let g be its
    gradient at a projection's input x. Dropping the smallest share s of x changes the loss by the
    sum of -g[k] x[k] over the dropped k. The mean square of that over the tokens, D(s), is a
    quadratic form of the Fisher information: to second order, twice the KL divergence from the
    dense model if only one token drops its inputs. `allocate` spends the budget by these curves.
    """
    levels = torch.arange(20) / 20  # steps of 0.01 gave noisier curves and a worse perplexity
    shape = model.config.n_layers, len(PROJECTIONS), -1
    edges = quantiles(levels.expand(shape)).to(model.device)  # [n_layers, 7, 20]
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
    if not costs.isfinite().all():
        raise CalibrationError("a gradient is not finite; try --dtype float32")
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


ALLOCATE = {"fisher": fisher, "greedy": greedy, "uniform": uniform}


def n_passes(allocation, n_windows):
    """About how many passes over a window an allocation makes."""
    return {"uniform": 0, "greedy": GREEDY_PASSES,
            "fisher": n_windows * (2 + 2 * DRAWS)}[allocation]
