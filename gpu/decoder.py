"""One decode step on a GPU: five operations per layer, captured as a CUDA graph.

The step computes what `decode.decode_one_token` does. Triton kernels take the place of PyTorch's
operations, and the graph takes the place of Python, which would be too slow to launch them.

The CUDA graph is gpt-fast's idea (PyTorch blog, "Accelerating Generative AI with PyTorch II",
2023).
"""

import gc

import torch

from gpu.compile_ahead import compile_together
from gpu.decode_attention import Workspace, decode_attention
from gpu.head import Head
from gpu.product import product
from gpu.token_kernels import embed
from model import PROJECTIONS, rms_norm
from sparse_gemv import launch_options


class GpuDecoder:
    """Runs decode steps of a model on its GPU over a KV cache, captured as a CUDA graph.

    A step reads weights for a few milliseconds. Hundreds of small kernels, launched from Python,
    would cost as much again in gaps. So a layer is five operations: RMSNorm + q|k|v, attention
    with RoPE and cache write, o + residual, RMSNorm + gate|up, SwiGLU + down + residual. A product
    is one kernel if all rows are read or each program sums few rows, else two (select, sum rows):
    gpu/product.py chooses. Whatever changes from token to token lives in GPU memory: the token, its
    position, thresholds, random state. So each kind of step (dense, sparse) is captured once, when
    it is first needed. Then the host only launches replays and fetches tokens.

    choose:     a function from any logits [V] to a token id, int64 [1], with GPU operations only
    generators: the torch.Generators that `choose` draws from
    graph:      for tests: False launches every kernel from Python, for the same result, slowly
    head:       top, seen, penalty: which logits `choose` needs (see `Head`); the default is all

    `kept`, int64 [n_layers, 7], counts the rows read by the `n_steps` steps so far.
    """

    def __init__(self, model, cache, choose, generators=(), *, graph=True, **head):
        config, device = model.config, model.device
        self.model, self.cache, self.choose = model, cache, choose
        self.thresholds = torch.full((config.n_layers, len(PROJECTIONS)), -1.0, device=device)
        self.kept = torch.zeros(self.thresholds.shape, dtype=torch.int64, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        # of the last token read; embed adds 1 first
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ropes = model.rope(0, cache.context)

        def buffer(size):
            return torch.empty(size, dtype=model.dtype, device=device)

        block = model.blocks[0]
        self.x = (buffer(config.hidden_size) if model.ranks is None else
                  model.ranks.empty(config.hidden_size, model.dtype, device))
        self.y = buffer(config.hidden_size)  # a block's output, before the norm that follows it
        self.qkv = buffer(block.qkv.ends[-1])
        self.attention = buffer(block.o.in_features)
        self.gate_up = buffer(block.gate_up.ends[-1])
        self.logits = buffer(config.vocab_size)
        self.head = Head(model.lm_head, (model.norm, config.norm_eps), **head)
        self.bounds = self.head.bounds
        self.workspace = Workspace(config.n_heads, config.n_kv_heads, config.head_dim, device)
        self.n_steps, self.generators = 0, generators
        self.sparse = False
        self.graphs = {} if graph else None  # {sparse: the captured step}

    def set_thresholds(self, thresholds):
        """Decode with thresholds float32 [n_layers, 7] from now on; -1 keeps everything."""
        self.thresholds.copy_(thresholds)
        self.sparse = bool((thresholds >= 0).any())
        self.prepare()

    def start(self, token, position):
        """Make `token`, an id, the input of the next step, at `position` in the text."""
        self.prepare()
        self.token.fill_(token)
        self.position.fill_(position - 1)

    def prepare(self):
        """Capture the current kind of step, unless it already is."""
        if self.graphs is not None and self.sparse not in self.graphs:
            with torch.cuda.device_of(self.x):
                self.graphs[self.sparse] = self.capture()

    def project(self, x, linear, out, **fused):
        """x times a matrix into `out`: each projection has its threshold, rows read are counted."""
        at = linear.layer, linear.places
        options = fused | {"ends": linear.ends, "kept": self.kept[at], "scale": linear.scale,
                           "bias": linear.bias, "out": out}
        product(x, linear.w_t, self.thresholds[at] if self.sparse else None, **options)

    def add(self, inputs, linear, norm, **fused):
        """Add a product to the residual stream, after a norm where the model has it there."""
        if self.model.config.norms_after:
            self.project(inputs, linear, self.y, **fused)
            self.x += rms_norm(self.y, norm, self.model.config.norm_eps)
        else:
            ranks = self.model.ranks
            residual = self.x if ranks is None or ranks.rank == 0 else None  # the first one's
            self.project(inputs, linear, self.x, residual=residual, **fused)
            if ranks is not None:
                ranks.all_reduce(self.x)

    def step(self):
        """Read `token`, one position after `position`, and put the next one in its place."""
        model, cache, config = self.model, self.cache, self.model.config
        x, eps = self.x, config.norm_eps
        embed(model, self.token, self.position, x)
        for block in model.blocks:
            before = None if config.norms_after else (block.attn_norm, eps)
            self.project(x, block.qkv, self.qkv, norm=before)
            if config.qk_norm == "all":
                q, k, _ = self.qkv.split(block.qkv.widths)
                q.copy_(rms_norm(q, block.q_norm, eps))
                k.copy_(rms_norm(k, block.k_norm, eps))
            norms = (block.q_norm, block.k_norm, eps) if config.qk_norm == "head" else None
            rope = self.ropes[config.rope_kind(block.i)]
            decode_attention(self.qkv, cache.k[block.i], cache.v[block.i], *rope, self.position,
                             self.workspace, self.attention, config.window(block.i), norms,
                             launch_options(model.device)["PDL"])
            self.add(self.attention, block.o, block.attn_norm)
            before = None if config.norms_after else (block.mlp_norm, eps)
            self.project(x, block.gate_up, self.gate_up, norm=before)
            self.add(self.gate_up, block.down, block.mlp_norm, swiglu=True)
        self.token.copy_(self.choose(self.head(x, self.logits)))

    def capture(self):
        """Compile the kernels and capture one step. What the trial step changes is restored."""
        states = [(generator, generator.get_state()) for generator in self.generators]
        changed = [(t, t.clone()) for t in (
            self.token, self.position, self.kept, self.head.rows_read)]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        gc.collect()  # an earlier decoder's graph must not be destroyed while this one is captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compile_together(self.step, self.x)
            self.token.zero_()  # chosen from garbage above, so perhaps not an id
            # The trial step writes the cache's last row, which is free until the end.
            self.position.fill_(self.cache.context - 2)
            self.step()
            # "thread_local": NCCL's own thread may look at the GPU meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        for generator, state in states:
            generator.set_state(state)
        for tensor, value in changed:
            tensor.copy_(value)
        return graph

    def advance(self):
        """Run one step without waiting for it."""
        self.n_steps += 1
        if self.graphs is None:
            self.step()
        else:
            self.graphs[self.sparse].replay()

    def head_rows(self):
        """Rows of the LM head read so far, those of its certificate not counted."""
        if self.bounds is None:
            return self.n_steps * self.model.config.vocab_size
        return self.head.rows_read.item()

    def tokens(self, n_steps):
        """Yield the ids that n_steps steps choose; the GPU is one step ahead of the host."""
        host = [torch.empty(1, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        done = [torch.cuda.Event() for _ in range(2)]
        for i in range(n_steps + 1):
            if i < n_steps:
                with torch.cuda.device_of(self.x):
                    self.advance()
                    host[i % 2].copy_(self.token, non_blocking=True)
                    done[i % 2].record()
            if i > 0:
                done[(i - 1) % 2].synchronize()
                yield host[(i - 1) % 2].item()
