"""The Python side of step.c: describes a model, its cache and its thresholds in C's structs.

Nothing is copied but norms and biases, which become float32: C reads the weights, the cache and
the thresholds where PyTorch keeps them.
"""

import ctypes
import weakref
from ctypes import POINTER, c_float, c_int32, c_void_p

import torch

from cpu.compiler import library
from cpu.matrix import DTYPES, Matrix, address, describe, describe_packed
from cpu.packed import Packed, PackedLinear
from lm_head import LARGEST_V, certificate_for, limits
from model import SITES

QK_NORMS = {None: 0, "head": 1, "all": 2}
MOST_SHARES = 64
PAD = 12  # as in step.c


class Layer(ctypes.Structure):
    _fields_ = [*((site, Matrix) for site in SITES),
                *((name, c_void_p) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm",
                                                "keys", "values")),
                ("window", c_int32), ("rope", c_int32)]


class Bounds(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("q", "scale", "error", "norm", "seen")),
                ("penalty", c_float), ("top", c_int32), ("fill", c_float), ("limit", c_float),
                ("largest_v", c_float),
                *((name, c_void_p) for name in ("upper", "lower", "read", "v"))]


class CModel(ctypes.Structure):
    _fields_ = [*((name, c_int32) for name in (
                    "n_layers", "hidden", "inter", "heads", "kv_heads", "head_dim", "vocab",
                    "context", "cache_dtype", "qk_norm", "norms_after")),
                *((name, c_float) for name in ("growth", "growth_at", "eps")),
                ("layers", POINTER(Layer)), ("n_ropes", c_int32),
                *((name, c_void_p) for name in ("frequency", "factor", "norm")),
                ("embedding", Matrix), ("head", Matrix), ("bounds", POINTER(Bounds)),
                ("positions", c_void_p), ("n_shares", c_int32),
                ("list_size", c_int32), ("sums", c_void_p * 2),
                *((name, c_void_p) for name in (
                    "attended", "mlp", "logits", "x", "h", "y", "qkv", "turns", "scores",
                    "up", "kept_x", "kept_k", "team")),
                ("token", c_int32), ("position", c_int32)]


class CStep:
    """One decode step of a model in C: `step(token, position)` -> logits, float32 [vocab_size].

    model, cache: as for `Model.forward`, on a CPU
    thresholds:   float32 [n_layers, 7]; changes in place count from the next step on
    kept:         int64 [n_layers, 7], to which the rows that were read are added
    n_shares:     into how many pieces the work is cut, one per thread
    top, seen, penalty: which logits matter, see `certificate_for`
    `bounds` is the Certificate that a step reads instead of the whole LM head, or None; of the head
    itself, it reads `head_rows` then.
    Raises NoCompiler (cpu/compiler.py) where there is no library.
    """

    def __init__(self, model, cache, thresholds, kept, n_shares=None, *, top=0, seen=None,
                 penalty=1.0):
        self.library = library()
        self.model, self.cache = model, cache  # C points into all of these while this lives
        self.thresholds, self.kept, self.tensors = thresholds, kept, []
        n_shares = min(n_shares or torch.get_num_threads(), MOST_SHARES)
        self.m = self.describe(model, cache, n_shares)
        self.logits = self.allocate(model, n_shares)
        self.head_rows = torch.zeros(n_shares, dtype=torch.int64)  # of the last step, by share
        packed = isinstance(model.lm_head, PackedLinear)  # smaller than its certificate would be
        self.bounds = None if packed else certificate_for(model.lm_head, top)
        if self.bounds is not None:
            self.describe_bounds(top, seen if penalty != 1 else None, penalty)
        self.library.start_team(ctypes.byref(self.m))
        weakref.finalize(self, self.library.stop_team, ctypes.byref(self.m))

    def __call__(self, token, position):
        self.library.step(ctypes.byref(self.m), token, position)
        return self.logits

    def describe(self, model, cache, n_shares):
        """The structs of a model."""
        config, kinds, head = model.config, list(model.rotations), model.lm_head
        growth, growth_at = config.query_growth
        layers = (Layer * config.n_layers)()
        for block, layer in zip(model.blocks, layers):
            for site in SITES:
                self.fill(getattr(layer, site), getattr(block, site))
            head_norms = ("q_norm", "k_norm") if config.qk_norm else ()
            for name in ("attn_norm", "mlp_norm", *head_norms):
                setattr(layer, name, self.floats(getattr(block, name)))
            layer.keys, layer.values = self.at(cache.k[block.i]), self.at(cache.v[block.i])
            layer.window = config.window(block.i) or 0
            layer.rope = kinds.index(config.rope_kind(block.i))
        frequency, factor = (torch.stack(parts) for parts in zip(*model.rotations.values()))
        m = CModel(
            n_layers=config.n_layers, hidden=config.hidden_size, inter=config.intermediate_size,
            heads=config.n_heads, kv_heads=config.n_kv_heads, head_dim=config.head_dim,
            vocab=config.vocab_size, context=cache.context, cache_dtype=DTYPES[cache.k.dtype],
            qk_norm=QK_NORMS[config.qk_norm], norms_after=config.norms_after,
            growth=growth, growth_at=growth_at, eps=config.norm_eps, layers=layers,
            n_ropes=len(kinds), frequency=self.floats(frequency), factor=self.floats(factor),
            norm=self.floats(model.norm), n_shares=n_shares,
            list_size=max(linear.in_features for linear in model.linears()) + PAD)
        self.fill(m.head, head)
        table = head.w_t.T if model.embedding is None else model.embedding
        if isinstance(table, Packed):
            m.embedding.packed = describe_packed([table])
        else:
            m.embedding.w, m.embedding.dtype = self.at(table), DTYPES[table.dtype]
        return m

    def fill(self, matrix, linear):
        """Describe a Linear; a block's has thresholds, the head none."""
        describe(matrix, linear, self.floats(linear.bias))
        if linear.layer is None:  # the head's product, if it is packed, keeps all
            matrix.thresholds = self.at(torch.full((1,), -1.0))
            matrix.kept = self.at(torch.zeros(1, dtype=torch.int64))
        else:
            places = linear.layer, linear.places
            matrix.thresholds = self.at(self.thresholds[places])
            matrix.kept = self.at(self.kept[places])

    def describe_bounds(self, top, seen, penalty):
        """The struct of the LM head's bounds."""
        b, m, (limit, fill) = Bounds(), self.m, limits(torch.float32)
        b.q, b.top, b.limit, b.fill = self.at(self.bounds.q), top, limit, fill
        b.scale, b.error, b.norm = (self.at(row) for row in self.bounds.rows)
        b.penalty, b.seen = penalty, self.at(seen)
        b.upper, b.lower = (self.at(torch.zeros(m.vocab)) for _ in range(2))
        b.largest_v, b.read = LARGEST_V, self.at(self.head_rows)
        b.v = self.at(torch.zeros(m.n_shares, m.hidden, dtype=torch.int16))
        m.bounds = ctypes.pointer(b)

    def allocate(self, model, n):
        """C's working memory, described in step.c; returns the logits."""
        m, logits = self.m, torch.zeros(model.config.vocab_size)
        widest = max(linear.ends[-1] for linear in [*model.linears(), model.lm_head])
        m.sums[:] = [self.at(torch.zeros(min(n, 4), widest)) for _ in range(2)]
        shapes = {"attended": (m.heads * m.head_dim,), "mlp": (m.inter,), "x": (n, m.hidden),
                  "h": (n, m.hidden), "y": (n, m.hidden), "qkv": (n, model.blocks[0].qkv.ends[-1]),
                  "turns": (n, m.n_ropes, m.head_dim), "scores": (n, m.context),
                  "up": (n, m.inter), "kept_x": (n, m.list_size)}
        for name, shape in shapes.items():
            setattr(m, name, self.at(torch.zeros(shape)))
        m.logits = self.at(logits)
        m.kept_k = self.at(torch.zeros(n, m.list_size, dtype=torch.int32))
        m.positions = self.at(torch.arange(m.context + PAD, dtype=torch.int32))
        return logits

    def at(self, tensor):
        """The address of a tensor, which is kept alive; None for None."""
        self.tensors.append(tensor)
        return address(tensor)

    def floats(self, tensor):
        """The address of a tensor's numbers as floats; None for None."""
        return self.at(None if tensor is None else tensor.float().contiguous())
