"""The decode step on the GPU: nine kernels a layer, captured once as a CUDA graph, replayed for every token.

Decoding one token at a time, a large model spends a few milliseconds a token reading weights, and as much again in
the gaps between hundreds of small kernels if Python launches them one by one. So the step is fused into RMSNorm +
q|k|v, attention (rotary embedding and cache write inside), o + residual, RMSNorm + gate|up, SwiGLU + down + residual,
then final norm + LM head and the choice of the token; each product is two kernels, see sparse_gemv.py. Whatever
changes from token to token (the token, its position, the thresholds, the random state) lives in GPU memory, so the
whole step is one graph that never has to be captured again, and the host does nothing but ask for the next replay and
fetch the token that came out.

The graph idea is gpt-fast's (PyTorch blog, "Accelerating Generative AI with PyTorch II", 2023); the sparsity is TEAL's
(arXiv:2408.14690).
"""

import torch

from decode_attention import Workspace, decode_attention
from model import PROJECTIONS, SITES
from sparse_gemv import sparse_gemv, supports_pdl


class Decoder:
    """Runs decode steps of a model on its GPU over a KV cache.

    choose:     a function of logits [vocab_size] that returns a token id, int64 [1], by GPU operations alone; or -1,
                which `tokens` hands on, while the next step, on its way already, takes token 0 instead
    generators: the torch.Generators that `choose` draws from
    graph:      False launches every kernel from Python, token by token: the same result, slow, for debugging

    `thresholds`, float32 [n_layers, 7] (order PROJECTIONS, -1 keeps everything), may be changed in place at any time;
    `kept`, int64 [n_layers, 7], counts the rows read by the `n_steps` steps so far.
    """

    def __init__(self, model, cache, choose, generators=(), graph=True):
        config, device = model.config, model.device
        self.model, self.cache, self.choose = model, cache, choose
        self.thresholds = torch.full((config.n_layers, len(PROJECTIONS)), -1.0, device=device)
        self.kept = torch.zeros(self.thresholds.shape, dtype=torch.int64, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        cos, sin = model.rope(0, cache.context)  # [context, 1, head_dim], see model.rotate
        half = config.head_dim // 2
        self.cos, self.sin = cos[:, 0, half:].contiguous(), sin[:, 0, half:].contiguous()  # [context, head_dim / 2]

        def buffer(size):
            return torch.empty(size, dtype=model.dtype, device=device)

        layer = model.layers[0]
        self.x = buffer(config.hidden_size)
        self.qkv = buffer(layer.qkv.ends[-1])
        self.attention = buffer(config.n_heads * config.head_dim)
        self.gate_up = buffer(layer.gate_up.ends[-1])
        self.logits = buffer(config.vocab_size)
        self.workspace = Workspace(config.n_heads, config.n_kv_heads, config.head_dim, device)
        self.graph = self.capture(generators) if graph else None
        self.n_steps = 0

    def project(self, x, p, out, **fused):
        """x times a projection into `out`, each of its parts with its own threshold, counting the rows read."""
        if p.layer is None:  # the LM head stays dense
            return sparse_gemv(x, p.w_t, -1.0, scale=p.scale, bias=p.bias, out=out, **fused)
        first = PROJECTIONS.index(SITES[p.site][0])
        columns = range(first, first + len(p.ends))
        segments = [(end, self.thresholds[p.layer, c:c + 1]) for end, c in zip(p.ends, columns)]
        return sparse_gemv(x, p.w_t, segments, scale=p.scale, bias=p.bias, out=out,
                           kept=self.kept[p.layer, first:first + len(p.ends)], **fused)

    def step(self):
        """One token: `self.token` at `self.position` in; the next token and position out, in the same tensors."""
        model, cache, eps = self.model, self.cache, self.model.config.norm_eps
        x = self.x
        x.copy_(model.embed(self.token.clamp(min=0))[0])
        for i, layer in enumerate(model.layers):
            self.project(x, layer.qkv, self.qkv, norm=(layer.attn_norm, eps))
            decode_attention(self.qkv, cache.k[i], cache.v[i], self.cos, self.sin, self.position, self.workspace,
                             self.attention, model.config.sliding_window, supports_pdl(model.device))
            self.project(self.attention, layer.o, x, residual=x)
            self.project(x, layer.gate_up, self.gate_up, norm=(layer.mlp_norm, eps))
            self.project(self.gate_up, layer.down, x, swiglu=True, residual=x)
        self.project(x, model.lm_head, self.logits, norm=(model.norm, eps))
        self.token.copy_(self.choose(self.logits))
        self.position += 1

    def capture(self, generators):
        """Compile the kernels and capture one step; whatever the trial steps change is put back."""
        states = [generator.get_state() for generator in generators]
        self.position.fill_(self.cache.context - 1)  # the trial steps write the cache's last row, free until the end
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.stream(stream):
            self.step()
            self.position.fill_(self.cache.context - 1)
            with torch.cuda.graph(graph, stream=stream):
                self.step()
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        for generator, state in zip(generators, states):
            generator.set_state(state)
        self.kept.zero_()
        return graph

    def start(self, token, position):
        """Make `token` (an id), at `position`, the input of the next step."""
        self.token.fill_(token)
        self.position.fill_(position)

    def advance(self):
        """Run one step without waiting for it."""
        self.n_steps += 1
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def tokens(self, n_steps):
        """Yield the ids that n_steps steps choose. The GPU works on the next step while the host has this one."""
        host = [torch.empty(1, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        done = [torch.cuda.Event() for _ in range(2)]
        for i in range(n_steps + 1):
            if i < n_steps:
                self.advance()
                host[i % 2].copy_(self.token, non_blocking=True)
                done[i % 2].record()
            if i > 0:
                done[(i - 1) % 2].synchronize()
                yield host[(i - 1) % 2].item()
