"""Measures a GPU: its bandwidth and rate, and where the time of a model goes, product by product.

A product cannot be faster than the bytes it reads divided by the memory's bandwidth. So the
bandwidth is measured first, in the same process, with a kernel that only reads. Every product
runs in a CUDA graph, as it does while decoding. Its weights lie in memory several times, and each
call takes the next copy, so that the L2 cache cannot help. `benchmark.py` prints the results.
"""

import torch
import triton
import triton.language as tl

from gpu.product import product
from model import SITES
from quantize import GROUP, can_be_int4

BITS = {"bfloat16": 16, "int8": 8, "int4": 5}  # of a weight, scales of groups included
COPIES_BYTES = 400_000_000  # of a product's weights: several times the L2 cache

# ---- the device --------------------------------------------------------------------------------

def seconds(run, repeats=5):
    """Median time of run() on the GPU, in seconds, after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def graph_of(run):
    """run(), captured in a CUDA graph, as a function that replays it."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as in decode.py
        run()
    return graph.replay


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def gpu_bandwidth():
    """Bytes a second at which a kernel reads 4 GiB: the best of three launch shapes."""
    x = torch.ones(1 << 30, device="cuda")
    out = torch.empty(1 << 20, device="cuda")
    times = []
    for block, steps in ((8192, 4), (4096, 8), (1024, 8)):
        grid = (x.numel() // (block * steps),)
        times.append(seconds(lambda: read_kernel[grid](x, out, block, steps, num_warps=8)))
    return x.nbytes / min(times)


def matmul_rate(dtype):
    """Operations a second (2 for each multiply-add) of products of 8192 x 8192 matrices.

    40 in a row take as long as a prefill. A GPU slows down while it works: an H100 from 765 to
    710 TFLOP/s.
    """
    a, b, c = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(3))
    return 40 * 2 * 8192 ** 3 / seconds(lambda: [torch.mm(a, b, out=c) for _ in range(40)])


# ---- a model -----------------------------------------------------------------------------------

def print_prefill(model):
    """Print how fast 2048 tokens go through the model at once, on a GPU."""
    tokens = torch.randint(model.config.vocab_size, (2048,), device=model.device)
    with torch.inference_mode():
        time = seconds(lambda: model.logits(model.forward(tokens)[-1:]))
    flops = 2 * 2048 * sum(
        linear.in_features * linear.ends[-1] for linear in model.linears())
    rate = matmul_rate(model.dtype)
    print(f"prefill of 2048 tokens: {2048 / time:.0f} tok/s, {flops / time / 1e12:.0f} TFLOP/s "
          f"in the projections, {flops / time / rate:.0%} of the {rate / 1e12:.0f} that one "
          "large product reaches", flush=True)


def print_timeline(decoder, n_steps=3):
    """Print the kernels of one layer of a decode step on a GPU: their times, the gaps between."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(n_steps):
            decoder.advance()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in profiler.events() if event.device_type == cuda]
    events.sort(key=lambda event: event.time_range.start)
    per_step = len(events) // n_steps
    print(f"timeline: {per_step} kernels per step; ten from its middle (us)")
    middle = per_step + per_step // 2
    for before, event in zip(events[middle - 1:], events[middle:middle + 10]):
        span = event.time_range
        print(f"  gap {span.start - before.time_range.end:6.2f}  run {span.end - span.start:6.2f}"
              f"  {event.name}")


# ---- products ----------------------------------------------------------------------------------

class Product:
    """One product of a decode step, with the operations that are fused into it there.

    k:    in_features
    ends: the last column + 1 of each of the matrices that lie side by side
    kind: of the weights, "bfloat16", "int8" or "int4"

    All tensors lie on PyTorch's default device.
    """

    def __init__(self, site, k, ends, kind):
        n = ends[-1]
        self.k, self.ends, self.bytes = k, ends, k * n * BITS[kind] // 8
        copies = max(2, COPIES_BYTES // self.bytes)
        self.weights = [random_weight(k, n, kind) for _ in range(copies)]
        self.x = torch.randn(k, dtype=torch.bfloat16)  # after the fused operations
        self.options = {"out": torch.empty(n, dtype=torch.bfloat16)}
        if site in ("qkv", "gate_up", "lm_head"):
            self.options["norm"] = torch.ones(k, dtype=torch.bfloat16), 0.0
            self.x /= self.x.float().square().mean().sqrt()
        else:
            self.options["residual"] = torch.randn(n, dtype=torch.bfloat16)
        self.input = self.x
        if site == "down":
            gate = torch.full_like(self.x, 40)  # silu(40) = 40
            self.input, self.options["swiglu"] = torch.cat((gate, self.x)), True
            self.x = gate * self.x
        self.kept = torch.zeros(len(ends), dtype=torch.int64)
        self.thresholds = None  # every row

    def run(self):
        for w_t, scale in self.weights:
            product(self.input, w_t, self.thresholds, ends=self.ends, scale=scale,
                     kept=self.kept, **self.options)

    def measure(self, sparsity):
        """(seconds of one product, bytes of the rows that it read)"""
        magnitude = self.x.float().abs().sort().values
        dropped = round(sparsity * self.k)
        self.thresholds = magnitude[dropped - 1].repeat(len(self.ends)) if dropped else None
        replay = graph_of(self.run)
        self.kept.zero_()
        replay()
        share = self.kept.sum().item() / (self.k * len(self.ends) * len(self.weights))
        return seconds(replay) / len(self.weights), self.bytes * share

    def cublas_seconds(self):
        """The dense product by PyTorch, of bfloat16 weights: the faster of both layouts."""
        x, best = self.x[None], float("inf")
        rows = [w_t for w_t, _ in self.weights]
        for weights in (rows, [w.T.contiguous().T for w in rows]):
            time = seconds(graph_of(lambda: [x @ w for w in weights]))
            best = min(best, time / len(weights))
        return best


def random_weight(k, n, kind):
    """(w_t, scale) of a random matrix, as `product` takes them."""
    if kind == "int4":
        return (torch.randint(0, 256, (k, n // 2), dtype=torch.uint8),
                torch.rand(k, n // GROUP, 2).bfloat16())
    if kind == "int8":
        return torch.randint(-127, 128, (k, n), dtype=torch.int8), torch.rand(n)
    return torch.randn(k, n, dtype=torch.bfloat16), None


def products(config):
    """(site, K, ends) of the products of a decode step, the LM head last."""
    for site in SITES:
        k, widths = config.linear_shape(site)
        yield site, k, tuple(sum(widths[:i + 1]) for i in range(len(widths)))
    yield "lm_head", config.hidden_size, (config.vocab_size,)


def kernels(configs, sparsities):
    """Print every product of the configs (name -> Config), with bfloat16, int8 and int4 weights,
    against the bandwidth and cuBLAS; returns the rows."""
    bandwidth = gpu_bandwidth()
    print(f"{torch.cuda.get_device_name()}, read bandwidth {bandwidth / 1e12:.2f} TB/s; torch "
          f"{torch.__version__}, triton {triton.__version__}")
    print(f"{'product':>20} {'K x N':>12} {'dtype':>5} {'sparsity':>8} {'us':>8} {'TB/s':>6} "
          f"{'of limit':>8} {'x cuBLAS':>8}")
    seen, rows = set(), []
    for name, config in configs.items():
        for site, k, ends in products(config):
            if (k, *ends) in seen:
                continue
            seen.add((k, *ends))
            cublas = None
            for kind in BITS:
                if kind == "int4" and not can_be_int4(site, ends):
                    continue
                with torch.device("cuda"):
                    timed = Product(site, k, ends, kind)
                cublas = cublas or timed.cublas_seconds()
                for sparsity in sparsities if site != "lm_head" else [0]:
                    time, n_bytes = timed.measure(sparsity)
                    row = {"config": name, "site": site, "k": k, "n": ends[-1],
                           "dtype": kind, "sparsity": sparsity,
                           "microseconds": time * 1e6, "bandwidth": n_bytes / time,
                           "share_of_limit": n_bytes / time / bandwidth,
                           "speedup_over_cublas": cublas / time}
                    rows.append(row)
                    print(f"{name + ' ' + site:>20} {k:>5}x{ends[-1]:<6} {kind[:5]:>5} "
                          f"{sparsity:>8.0%} {time * 1e6:>8.2f} {n_bytes / time / 1e12:>6.2f} "
                          f"{row['share_of_limit']:>8.0%} {row['speedup_over_cublas']:>8.2f}",
                          flush=True)
                del timed  # before the next one needs its memory
    return rows
