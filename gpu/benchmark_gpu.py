"""Measures a GPU: its bandwidth and rate, and where the time of a model goes, kernel by kernel.

A decode step cannot be faster than the bytes it reads divided by the memory's bandwidth. So
`benchmark.py` measures the bandwidth first, in the same process, with a kernel that only reads.
"""

import torch
import triton
import triton.language as tl


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
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as in decoder.py
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
