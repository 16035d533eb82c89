"""Measures decoding speed against the limit that the bytes set, and against transformers.

A decode step cannot be faster than the bytes it reads divided by the memory's bandwidth. So the
bandwidth is measured first, in the same process, and every speed is printed beside its bytes and
its share of that limit. Weights are random, in the shapes of a named model, or those of a real
model. The sparsity is counted, row by row, while the steps are timed. All sparsities take turns,
several times over, and the medians are compared. A machine that slows down thus slows down all
of them.

    python benchmark.py --config llama-3-8b --sparsity 0 0.25 0.4 0.5 0.65 --json speed.json
    python benchmark.py --device cpu --sparsity 0 0.4 0.5 --compare transformers
"""

import importlib.util
import os
import time

# Before PyTorch starts its threads, as in generate.py, which says why.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

import calibrate
from calibrations.thresholds import find
from checkpoint.files import require_writable
from checkpoint.known_models import KNOWN_MODELS
from checkpoint.memory import require_memory
from checkpoint.tensors import weight_bytes
from cli.accounting import block_bytes, cache_bytes, other_bytes, tokens_attended
from cli.command_line import (
    COUNT,
    add_model_flags,
    add_sparsities,
    load_model,
    make_parser,
    run_script,
)
from cli.results import write_rows
from cli.transformers_speed import transformers_speed
from decode import new_decoder
from lm_head import head_saving
from model import PROJECTIONS, KVCache, Linear, Model
from quantize import GROUP, GROUP_BYTES, Int4Linear, Int8Linear, int4_linear
from sampling import likeliest
from tensor_parallel import from_first, mean, rank, ranks, start, world_size

if torch.cuda.is_available():
    from gpu import benchmark_gpu as gpu

TEXT = "It was a bright cold day in April."  # what a real model continues


def process_seconds():
    """Seconds since this process started, as Linux reports."""
    with open("/proc/self/stat") as f:
        started = int(f.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as f:
        return float(f.read().split()[0]) - started


def read_bandwidth(device):
    """Bytes a second at which a torch.device reads its memory, with all of a CPU's threads."""
    if device.type == "cuda":
        return gpu.gpu_bandwidth()
    x, times = torch.ones(1 << 27), []  # 512 MiB, more than any cache holds
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


# ---- what is measured --------------------------------------------------------------------------

def random_model(config, dtype, device, quantize):
    """A Model of this Config with random weights that keep the size of the hidden states."""
    kind = {"int8": Int8Linear, "int4": int4_linear, None: Linear}[quantize]
    model = Model(config, dtype, device, kind)
    generator = torch.Generator(model.device).manual_seed(0)
    options = {"device": model.device, "generator": generator}
    for linear in [*model.linears(), model.lm_head]:
        size = linear.in_features ** -0.5  # the standard deviation of a weight
        for i, width in enumerate(linear.widths):
            shape = width, linear.in_features
            if isinstance(linear, Int4Linear):
                groups = torch.randint(0, 256, (width // GROUP, linear.in_features, GROUP_BYTES),
                                       dtype=torch.uint8, **options)
                scale, minimum = groups[..., -4:].view(torch.bfloat16).unbind(-1)
                scale.fill_(size / 4.6)  # 4.6 is the standard deviation of 0 ... 15
                minimum.fill_(-7.5 * size / 4.6)
                linear.load_weight(i, groups)
            elif quantize:
                q = torch.randint(-127, 128, shape, dtype=torch.int8, **options)
                linear.load_weight(i, q)
                linear.load_scale(i, size / 73)  # 73 is the standard deviation of q
            else:
                linear.load_weight(i, torch.randn(shape, dtype=dtype, **options).mul_(size))
    if model.embedding is not None:
        model.embedding.normal_(generator=generator)
    for block in model.blocks:
        block.attn_norm.fill_(1)
        block.mlp_norm.fill_(1)
    model.norm.fill_(1)
    return model


def make_model(args):
    """The flags -> (its name, Model, a prompt for it as a tensor of ids)."""
    if args.config is None:
        model, tokenizer = load_model(args)
        ids = tokenizer.encode(TEXT)
        check_context(args, model.config)
        return args.model or "SmolLM2-135M-Instruct", model, torch.tensor(ids, device=args.device)
    config, dtype = KNOWN_MODELS[args.config], getattr(torch, args.dtype)
    check_context(args, config)
    args.device, shared = start(args.device), ranks()
    part = config if shared is None else shared.slim(config)
    require_memory(weight_bytes(part, dtype, args.quantize), args.device,
                   f"{args.config} in {args.quantize or args.dtype}",
                   "try --quantize int8 or a smaller --config")
    model = random_model(part, dtype, args.device, args.quantize)
    if shared is not None:
        shared.connect(model)
    return args.config, model, random_tokens(model, 100)


def check_context(args, config):
    """Raise ValueError for a --context beyond the model's."""
    if max(args.context) > config.context:
        raise ValueError(f"--context {max(args.context)} is longer than this model's text of at "
                         f"most {config.context} tokens")


def random_tokens(model, n):
    """n random token ids on the model's device, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (n,), generator=generator).to(model.device)


def choose_thresholds(model, args):
    """[thresholds float32 [n_layers, 7] for each sparsity of the flags], and where they are from.

    A real model uses its calibration. Without one, and for random weights, random tokens do.
    """
    dense = torch.full((model.config.n_layers, len(PROJECTIONS)), -1.0)
    if not any(args.sparsity):
        return [dense for _ in args.sparsity], "no thresholds"
    calibration = find(model) if args.config is None else None
    if calibration is None:
        n = 1024 if model.device.type == "cuda" else 256  # a CPU would need minutes for more
        window = min(n // 2, model.config.context)
        calibration = calibrate.calibrate(
            model, random_tokens(model, n).cpu(), window, "uniform", source="random tokens")
    origin = (f"thresholds by {calibration.metadata['allocation']} from "
              f"{calibration.metadata.get('source') or 'a file'}")
    thresholds = [calibration.thresholds(s) if s else dense for s in args.sparsity]
    return from_first(thresholds), origin


# ---- measuring ---------------------------------------------------------------------------------

@torch.inference_mode()
def fill(model, cache, prompt, n_tokens):
    """Make n_tokens, the prompt [T] over and over, all that a KV cache holds."""
    cache.length = 0
    for chunk in prompt.repeat(n_tokens // len(prompt) + 1)[:n_tokens].split(512):
        model.forward(chunk, cache)


def decode_speeds(decoder, thresholds, prompt, context, n_tokens, runs):
    """Decode n_tokens, around `context`, with each of the thresholds in turn, `runs` times over.

    thresholds: a list of float32 [n_layers, 7]
    Returns for each: (median of tokens a second, bytes read per token, sparsity reached).
    """
    model, cache, config = decoder.model, decoder.cache, decoder.model.config
    first = max(1, context - n_tokens // 2)
    fill(model, cache, prompt, first)
    token = prompt[first % len(prompt)].item()
    times, blocks = [[] for _ in thresholds], [0 for _ in thresholds]
    savings = list(blocks)
    for run in range(runs + 1):
        for i, t in enumerate(thresholds):
            decoder.set_thresholds(t)
            decoder.kept.zero_()
            rows = decoder.head_rows()
            decoder.start(token, first)
            start = time.perf_counter()
            for _ in decoder.tokens(n_tokens):
                pass
            if run > 0:  # the first round warms up
                times[i].append(time.perf_counter() - start)
            blocks[i] = mean(block_bytes(model, decoder.kept) / n_tokens)
            savings[i] = head_saving(model.lm_head, decoder.bounds,
                                     (decoder.head_rows() - rows) / n_tokens)
    cache = tokens_attended(config, first + n_tokens / 2) * cache_bytes(config, model.dtype)
    rest = other_bytes(model) + cache
    return [(n_tokens / sorted(t)[runs // 2], read + rest - saved, 1 - read / block_bytes(model))
            for t, read, saved in zip(times, blocks, savings)]


def reduce_seconds(decoder, repeats=20):
    """Seconds that the all-reduces of one layer take under torchrun, one after the other."""
    model = decoder.model
    x = model.ranks.empty(model.config.hidden_size, model.dtype, model.device)
    x.zero_()

    def run():
        for _ in range(2 * repeats):
            model.ranks.all_reduce(x)

    if x.is_cuda:
        return gpu.seconds(gpu.graph_of(run)) / repeats
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / repeats


# ---- command line ------------------------------------------------------------------------------

def measure(args):
    """Measure as the flags say; prints the results and returns them, one dict per line."""
    start = process_seconds()
    name, model, prompt = make_model(args)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    loading = process_seconds() - start
    n_tokens, runs = (200, 3) if on_gpu else (128, 5)
    cache = KVCache(model.config, max(args.context) + n_tokens, model.dtype, model.device)
    decoder = new_decoder(model, cache, likeliest, top=int(args.head == "auto"))
    fill(model, cache, prompt, 100)
    decoder.start(1, 100)
    next(decoder.tokens(1))
    first_token = process_seconds() - loading

    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = read_bandwidth(model.device)
    print(f"{name} {args.dtype}{' ' + args.quantize if args.quantize else ''} on {device}: read "
          f"bandwidth {bandwidth / 1e9:.0f} GB/s, torch {torch.__version__}, first token "
          f"{first_token:.1f} s after the process started, without the weights", flush=True)
    if on_gpu:
        gpu.print_prefill(model)
    thresholds, origin = choose_thresholds(model, args)
    print(f"{n_tokens} tokens around the context, median of {runs} alternating runs; {origin}")
    print(f"{'context':>7} {'sparsity':>8} {'realised':>8} {'tok/s':>8} {'GB/token':>8} "
          f"{'limit':>7} {'of limit':>8}", flush=True)
    settings = {"config": name, "gpu": device if on_gpu else None, "dtype": args.dtype}
    rows = []
    for context in args.context:
        speeds = decode_speeds(decoder, thresholds, prompt, context, n_tokens, runs)
        for sparsity, (speed, size, realised) in zip(args.sparsity, speeds):
            limit = bandwidth / size
            rows.append(settings | {
                "quantize": args.quantize, "sparsity": sparsity, "realised_sparsity": realised,
                "context": context, "tokens_per_second": speed, "bytes_per_token": size,
                "read_bandwidth": bandwidth, "share_of_limit": speed / limit})
            print(f"{context:>7} {sparsity:>8.0%} {realised:>8.3f} {speed:>8.1f} "
                  f"{size / 1e9:>8.3f} {limit:>7.0f} {speed / limit:>8.0%}", flush=True)
        if args.timeline:
            gpu.print_timeline(decoder)  # of the last sparsity
    if world_size() > 1:
        reduces = reduce_seconds(decoder) * 1e6
        print(f"{world_size()} ranks, bytes and limit of each; {reduces:.1f} us per layer in "
              "all-reduces, timed alone")
        rows = [row | {"ranks": world_size(), "reduce_microseconds": reduces} for row in rows]
    if on_gpu:
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if args.compare:
        speed = transformers_speed(model, args.context[0], n_tokens)
        print(f"transformers{', static cache, compiled' if on_gpu else ''}, context "
              f"{args.context[0]}: {speed:.1f} tok/s")
        rows.append(settings | {"engine": "transformers", "context": args.context[0],
                                "tokens_per_second": speed})
    return rows


def parse_args():
    parser = make_parser(__doc__)
    add = add_model_flags(parser, dtype="bfloat16")
    parser.set_defaults(device=None)  # whether it was given makes a difference below
    add("--config", choices=KNOWN_MODELS, help="random weights of these shapes instead (default: "
        "llama-3-8b on a GPU; a CPU measures --model)")
    add = parser.add_argument_group("what to measure").add_argument
    add_sparsities(add, [0, 0.25, 0.4, 0.5, 0.65])
    add("--context", type=COUNT, nargs="+", default=[200], metavar="N",
        help="tokens in the KV cache (default: %(default)s)")
    add("--head", choices=("auto", "whole"), default="auto",
        help="whole: read the whole LM head (default: only rows that matter)")
    add("--compare", choices=["transformers"],
        help="also time this engine on the same weights, dense")
    add("--timeline", action="store_true",
        help="on a GPU: also print the kernels of a layer, their times and gaps")
    add("--json", metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    if args.device is None and not torch.cuda.is_available():
        if args.config:  # 7B parameters keep a CPU busy for long
            parser.error("there is no GPU here; add --device cpu to measure --config on the CPU")
        args.device = "cpu"
    args.device = args.device or "cuda"
    on_gpu = args.device.startswith("cuda")
    if args.timeline and not on_gpu:
        parser.error(f"--timeline needs a GPU, and {args.device} is not a GPU; leave it out")
    if args.model and args.config:
        parser.error("--model and --config name two models; give one of them")
    if args.compare and importlib.util.find_spec(args.compare) is None:
        parser.error(f"--compare {args.compare} needs that package; pip install {args.compare}")
    if on_gpu and not (args.model or args.config):
        args.config = "llama-3-8b"
    return args


def main():
    args = parse_args()
    if rank() > 0:
        args.json = None  # the first rank writes it
    if args.json:  # now, so that no measurement is lost
        require_writable(args.json, "--json")
    rows = measure(args)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    run_script(main)
