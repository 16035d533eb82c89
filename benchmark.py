"""Measures decoding speed: on a GPU against the limit that the bytes set, and everywhere against transformers.

A decode step cannot be faster than the bytes it reads divided by the memory's bandwidth. So the bandwidth is measured
first, in the same process, and every speed is reported beside its bytes and its share of that limit. Weights are
random in the shapes of a named model (or those of a real one); the thresholds come from calibrating this very model,
so that the sparsity is what the row says: it is counted, row by row, while the steps are timed.

    python benchmark.py --config llama-3-8b --sparsity 0 0.25 0.4 0.5 0.65 --json results/llama-3-8b.json
    python benchmark.py --kernels
    python benchmark.py --device cpu --sparsity 0 0.4 0.5 --compare transformers
"""

import argparse
import json
import os
import sys
import time

import torch
import triton
import triton.language as tl

import calibrate
import sparse_gemv as gemv
from calibration import find
from checkpoint import load
from decode import Decoder
from generate import Session, sample
from model import SITES, Config, KVCache, Model

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
CONFIGS = {  # architecture, vocab, hidden, intermediate, layers, heads, key heads, head_dim
    "llama-3.2-1b": Config("llama", 128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, rope_scaling=LLAMA3_ROPE,
                           context=131072, tie_embeddings=True),
    "llama-2-7b": Config("llama", 32000, 4096, 11008, 32, 32, 32, 128, context=4096),
    "llama-2-13b": Config("llama", 32000, 5120, 13824, 40, 40, 40, 128, context=4096),
    "llama-3-8b": Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, context=32768),
    "mistral-7b": Config("mistral", 32000, 4096, 14336, 32, 32, 8, 128, context=32768, sliding_window=4096),
    "llama-2-70b": Config("llama", 32000, 8192, 28672, 80, 64, 8, 128, context=4096),
}


def process_seconds():
    """Seconds since this process started, as Linux tells."""
    with open("/proc/self/stat") as f:
        started = int(f.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as f:
        return float(f.read().split()[0]) - started


def seconds(run, repeats=5):
    """Median time of run() on the GPU, in seconds, after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def graph_of(run):
    """run(), captured, as a function that replays it."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        total += tl.load(x_ptr + first + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def read_bandwidth():
    """Bytes a second that a kernel which only reads, 4 GiB, gets: the best of three shapes, each a median."""
    x = torch.ones(1 << 30, device="cuda")
    out = torch.empty(1 << 20, device="cuda")
    times = []
    for block, steps in ((8192, 4), (4096, 8), (1024, 8)):
        grid = (x.numel() // (block * steps),)
        times.append(seconds(lambda: read_kernel[grid](x, out, block, steps, num_warps=8)))
    return x.nbytes / min(times)


def matmul_rate(dtype):
    """Multiply-adds times two a second of an 8192 x 8192 x 8192 product of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192 ** 3 / seconds(lambda: a @ b)


def random_model(config, dtype, quantize):
    """A model of this config with random weights that keep the hidden states' size."""
    model = Model(config, dtype, "cuda", quantize)
    generator = torch.Generator("cuda").manual_seed(0)
    for p in [model.lm_head] + [getattr(layer, site) for layer in model.layers for site in SITES]:
        k = p.w_t.shape[0]
        if p.w_t.dtype == torch.int8:
            p.w_t.random_(-127, 128, generator=generator)
            p.scale.fill_(1 / (73 * k ** 0.5))  # 73: the standard deviation of these integers
        else:
            p.w_t.normal_(0, k ** -0.5, generator=generator)
    if model.embedding is not None:
        model.embedding.normal_(generator=generator)
    for norm in [model.norm] + [norm for layer in model.layers for norm in (layer.attn_norm, layer.mlp_norm)]:
        norm.fill_(1)
    return model


def decode_speed(model, decoder, thresholds, context, n_tokens=200, runs=3):
    """Decode n_tokens, around `context`, several times -> (tokens a second: the median, bytes a token, sparsity)."""
    decoder.thresholds.copy_(thresholds)
    first = max(0, context - n_tokens // 2)
    n_layers, config = len(model.layers), model.config

    def run(n):
        decoder.start(token=1, position=first)
        start = time.perf_counter()
        for _ in decoder.tokens(n):
            pass
        return time.perf_counter() - start

    run(n_tokens)
    decoder.kept.zero_()
    times = sorted(run(n_tokens) for _ in range(runs))
    read = model.block_bytes(decoder.kept) / (runs * n_tokens)
    seen = min(first + n_tokens / 2, config.sliding_window or float("inf"))
    cache = seen * n_layers * 2 * config.n_kv_heads * config.head_dim * decoder.cache.k.element_size()
    sparsity = 1 - read / model.block_bytes()
    return n_tokens / times[runs // 2], read + model.lm_head.w_t.nbytes + cache, sparsity


def timeline(decoder, n_steps=3):
    """Print what runs on the GPU during a step: every kernel's time and the gap before it, by kind."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(n_steps):
            decoder.advance()
        torch.cuda.synchronize()
    events = sorted((e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA),
                    key=lambda e: e.time_range.start)
    per_layer = len(events) // n_steps
    print(f"timeline: {per_layer} kernels a step; one layer from the middle (us)")
    middle = per_layer + per_layer // 2
    for before, e in zip(events[middle - 1:], events[middle:middle + 10]):
        gap = e.time_range.start - before.time_range.end
        print(f"  gap {gap:6.2f}  run {e.time_range.end - e.time_range.start:6.2f}  {e.name}")


def transformers_speed(model, context, n_tokens=200, runs=3):
    """Tokens a second of transformers' greedy generate on the same weights; on a GPU with a static cache, compiled."""
    import transformers

    c = model.config
    theirs = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.context,
        tie_word_embeddings=c.tie_embeddings)
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(theirs).to(model.dtype)
    llama = llama.to_empty(device=model.device).eval()
    for i, (layer, ours) in enumerate(zip(llama.model.layers, model.layers)):
        for site, names in SITES.items():
            p = getattr(ours, site)
            block = layer.self_attn if site in ("qkv", "o") else layer.mlp
            for name, part in zip(names, p.w_t.split(p.widths, dim=1)):
                getattr(block, name + "_proj").weight.data.copy_(part.T)
        layer.input_layernorm.weight.data.copy_(ours.attn_norm)
        layer.post_attention_layernorm.weight.data.copy_(ours.mlp_norm)
    llama.model.norm.weight.data.copy_(model.norm)
    llama.lm_head.weight.data.copy_(model.lm_head.w_t.T)
    llama.model.embed_tokens.weight.data.copy_(model.lm_head.w_t.T if model.embedding is None else model.embedding)
    llama.tie_weights()
    llama.model.rotary_emb = type(llama.model.rotary_emb)(theirs).to(model.device)  # to_empty lost its frequencies
    llama.generation_config.eos_token_id = None
    prompt = torch.ones(1, max(1, context - n_tokens // 2), dtype=torch.int64, device=model.device)
    options = {"do_sample": False, "pad_token_id": 0}
    if model.device.type == "cuda":
        options["cache_implementation"] = "static"

    def run(n):
        start = time.perf_counter()
        ids = llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                             **options)
        ids.cpu()  # waits for the device
        return time.perf_counter() - start

    run(n_tokens), run(n_tokens)  # compiles
    whole, prefill = (sorted(run(n) for _ in range(runs))[runs // 2] for n in (n_tokens, 1))
    return (n_tokens - 1) / (whole - prefill)


def cpu_speed(args):
    """Print what decoding the default model, or another real one, costs on this machine's CPU."""
    model, tokenizer = load(args.model, dtype=getattr(torch, args.dtype), quantize=args.quantize)
    calibration = find(model)
    if calibration is None:
        raise ValueError("there is no calibration for this model yet; make one with calibrate.py")
    prompt, rows = tokenizer.encode("It was a bright cold day in April.") * 12, []
    name = args.model or "SmolLM2-135M-Instruct"
    print(f"{name} {args.dtype} {args.quantize or ''} on a CPU, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; 128 tokens after {len(prompt)}, median of 3")
    for sparsity in args.sparsity:
        sessions = [Session(model, calibration.thresholds(sparsity) if sparsity else None, context=len(prompt) + 128)
                    for _ in range(4)]
        for session in sessions:  # the first one warms up
            list(session.generate(prompt, 128))
        speed = sorted(session.stats.steps / session.stats.decode_seconds for session in sessions[1:])[1]
        rows.append({"config": name, "gpu": None, "dtype": args.dtype,
                     "quantize": args.quantize, "sparsity": sparsity, "realised_sparsity": session.sparsity(),
                     "context": len(prompt) + 64, "tokens_per_second": speed,
                     "bytes_per_token": session.bytes_per_token()})
        print(f"sparsity {sparsity:.0%}, realised {session.sparsity():.3f}: {speed:.1f} tok/s, "
              f"{session.bytes_per_token() / 1e6:.0f} MB a token", flush=True)
    if args.compare:
        speed = transformers_speed(model, len(prompt) + 64, 128)
        rows.append({"config": name, "engine": "transformers", "gpu": None, "dtype": args.dtype,
                     "context": len(prompt) + 64, "tokens_per_second": speed})
        print(f"transformers: {speed:.1f} tok/s")
    return rows


# ---- kernels -------------------------------------------------------------------------------------------------------

def shapes(config):
    """(name, K, ends) of the products of a decode step."""
    products = []
    for site in SITES:
        k, widths = config.shapes(site)
        products.append((site, k, [sum(widths[:i + 1]) for i in range(len(widths))]))
    return products + [("lm_head", config.hidden_size, [config.vocab_size])]


class Product:
    """One product of a decode step, fused as it is there, with copies of its weights that together overflow the L2
    cache several times."""

    def __init__(self, site, k, ends, dtype):
        n, int8 = ends[-1], dtype == torch.int8
        copies = max(2, int(4e8 / (k * n * dtype.itemsize)))
        self.k, self.ends, self.bytes = k, ends, k * n * dtype.itemsize
        self.weights = [torch.randint(-127, 128, (k, n), dtype=torch.int8, device="cuda") if int8 else
                        torch.randn(k, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        self.x = torch.randn(k, device="cuda", dtype=torch.bfloat16)  # as the product takes it, after the fused steps
        self.options = {"out": torch.empty(n, device="cuda", dtype=torch.bfloat16)}
        if int8:
            self.options["scale"] = torch.rand(n, device="cuda")
        if site in ("qkv", "gate_up", "lm_head"):
            self.options["norm"] = torch.ones(k, device="cuda", dtype=torch.bfloat16), 0.0
            self.x /= self.x.float().square().mean().sqrt()
        else:
            self.options["residual"] = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        self.input = self.x
        if site == "down":
            gate = torch.full_like(self.x, 40)  # silu(40) = 40
            self.input, self.options["swiglu"] = torch.cat((gate, self.x)), True
            self.x = gate * self.x
        self.kept = torch.zeros(len(ends), dtype=torch.int64, device="cuda")
        self.threshold = torch.empty(1, device="cuda")

    def run(self):
        segments = [(end, self.threshold) for end in self.ends]
        for w_t in self.weights:
            gemv.sparse_gemv(self.input, w_t, segments, kept=self.kept, **self.options)

    def seconds(self, sparsity):
        """(seconds of one product in a CUDA graph, bytes of the rows that it read)"""
        magnitude = self.x.float().abs().sort().values
        dropped = round(sparsity * self.k)
        self.threshold.fill_(magnitude[dropped - 1] if dropped else -1.0)
        replay = graph_of(self.run)
        self.kept.zero_()
        replay()
        share = self.kept.sum().item() / (self.k * len(self.ends) * len(self.weights))
        return seconds(replay) / len(self.weights), self.bytes * share

    def cublas_seconds(self):
        """The same dense product by PyTorch: bfloat16 weights, the faster of both layouts."""
        x, best = self.x[None], float("inf")
        rows = [w.to(torch.bfloat16) for w in self.weights]
        for weights in (rows, [w.T.contiguous().T for w in rows]):
            best = min(best, seconds(graph_of(lambda: [x @ w for w in weights])) / len(weights))
        return best


def kernels(names, sparsities):
    """Print every product of the named configs, bfloat16 and int8, against the read bandwidth and cuBLAS."""
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}, "
          f"triton {triton.__version__}; times in a CUDA graph, weights rotated past the L2 cache")
    print(f"{'product':>32} {'dtype':>5} {'sparsity':>8} {'us':>8} {'TB/s':>6} {'of limit':>8} {'x cuBLAS':>8}")
    seen, rows = set(), []
    for name in names:
        for site, k, ends in shapes(CONFIGS[name]):
            if (k, *ends) in seen:
                continue
            seen.add((k, *ends))
            cublas = None
            for dtype in (torch.bfloat16, torch.int8):
                product = Product(site, k, ends, dtype)
                cublas = cublas or product.cublas_seconds()
                for sparsity in sparsities if site != "lm_head" else [0]:
                    time_, bytes_ = product.seconds(sparsity)
                    row = {"config": name, "site": site, "k": k, "n": ends[-1], "dtype": str(dtype)[6:],
                           "sparsity": sparsity, "microseconds": time_ * 1e6, "bandwidth": bytes_ / time_,
                           "share_of_limit": bytes_ / time_ / bandwidth, "speedup_over_cublas": cublas / time_}
                    rows.append(row)
                    print(f"{name + ' ' + site:>20} {k:>5}x{ends[-1]:<6} {row['dtype'][:5]:>5} {sparsity:>8.0%} "
                          f"{time_ * 1e6:>8.2f} {bytes_ / time_ / 1e12:>6.2f} {row['share_of_limit']:>8.0%} "
                          f"{row['speedup_over_cublas']:>8.2f}", flush=True)
                del product
    return rows


# ---- command line --------------------------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description="Decoding speed against the limit set by the bytes.",
                                     epilog="examples:\n" + __doc__.rpartition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to measure").add_argument
    add("--config", choices=CONFIGS, default="llama-3-8b", help="random weights of these shapes (default: %(default)s)")
    add("--model", help="a real model instead: Hugging Face folder, hub id or .gguf file")
    add("--kernels", action="store_true", help="the products of all configs one by one, instead of a model")
    add("--compare", choices=["transformers"], help="also time this engine on the same weights, dense")
    add("--timeline", action="store_true", help="also print the kernels of one layer with their times and gaps")
    add = parser.add_argument_group("how").add_argument
    add("--sparsity", type=float, nargs="+", default=[0, 0.25, 0.4, 0.5, 0.65], metavar="S",
        help="default: %(default)s")
    add("--context", type=int, nargs="+", default=[200], metavar="N", help="tokens in the cache (default: %(default)s)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s; cpu needs a real model")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    add("--quantize", choices=["int8"], help="int8 weights")
    add("--json", metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "benchmark.py: error: no GPU here; try --device cpu\n")
    return args


def run(args):
    dtype = getattr(torch, args.dtype)
    loading = process_seconds()
    if args.model:
        model, _ = load(args.model, dtype=dtype, device="cuda", quantize=args.quantize)
    else:
        model = random_model(CONFIGS[args.config], dtype, args.quantize)
    torch.cuda.synchronize()
    loading = process_seconds() - loading
    n_tokens, config, name = 200, model.config, args.model or args.config

    cache = KVCache(config, max(args.context) + n_tokens, dtype, "cuda")
    prompt = torch.randint(0, config.vocab_size, (100,), device="cuda")
    model.logits(model.forward(prompt, cache)[-1:])
    decoder = Decoder(model, cache, lambda logits: sample(logits, 0))
    decoder.start(1, cache.length)
    next(decoder.tokens(1))
    first_token = process_seconds() - loading

    bandwidth = read_bandwidth()
    print(f"{name} {args.dtype}{' ' + args.quantize if args.quantize else ''} on {torch.cuda.get_device_name()}: read "
          f"bandwidth {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}, triton {triton.__version__}, first token "
          f"{first_token:.1f} s after the process started (weights excepted)", flush=True)
    tokens = torch.randint(0, config.vocab_size, (2048,), device="cuda")
    with torch.inference_mode():
        prefill = seconds(lambda: model.logits(model.forward(tokens)[-1:]))
    flops = 2 * 2048 * sum(getattr(layer, site).w_t.numel() for layer in model.layers for site in SITES)
    rate = matmul_rate(dtype)
    print(f"prefill of 2048 tokens: {2048 / prefill:.0f} tok/s, {flops / prefill / 1e12:.0f} TFLOP/s in the "
          f"projections, {flops / prefill / rate:.0%} of the {rate / 1e12:.0f} that one large product reaches",
          flush=True)

    calibration = calibrate.calibrate(model, tokens[:1024].cpu(), 512, "uniform", source="random tokens")
    rows = []
    print(f"{'context':>7} {'sparsity':>8} {'realised':>8} {'tok/s':>8} {'GB/token':>8} {'limit':>7} {'of limit':>8}")
    for context in args.context:
        for sparsity in args.sparsity:
            speed, size, realised = decode_speed(model, decoder, calibration.thresholds(sparsity), context, n_tokens)
            limit = bandwidth / size
            rows.append({"config": name, "gpu": torch.cuda.get_device_name(), "dtype": args.dtype,
                         "quantize": args.quantize, "sparsity": sparsity, "realised_sparsity": realised,
                         "context": context, "tokens_per_second": speed, "bytes_per_token": size,
                         "read_bandwidth": bandwidth, "share_of_limit": speed / limit})
            print(f"{context:>7} {sparsity:>8.0%} {realised:>8.3f} {speed:>8.1f} {size / 1e9:>8.3f} {limit:>7.0f} "
                  f"{speed / limit:>8.0%}", flush=True)
            if args.timeline:
                timeline(decoder)
    print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if args.compare:
        speed = transformers_speed(model, args.context[0], n_tokens)
        print(f"transformers, static cache, compiled, context {args.context[0]}: {speed:.1f} tok/s")
        rows.append({"config": name, "engine": "transformers", "gpu": torch.cuda.get_device_name(), "dtype": args.dtype,
                     "context": args.context[0], "tokens_per_second": speed})
    return rows


def main():
    args = parse_args()
    try:
        if args.device == "cpu":
            rows = cpu_speed(args)
        else:
            rows = kernels(CONFIGS, args.sparsity) if args.kernels else run(args)
        if args.json:
            os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
            with open(args.json + ".tmp", "w") as f:
                json.dump(rows, f, indent=1)
            os.replace(args.json + ".tmp", args.json)
    except ValueError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
