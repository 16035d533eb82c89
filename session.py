"""One growing text: prefill, then token after token from a decoder, counting what is read.

Prefill takes the whole prompt through the model at once, dense: its time is arithmetic, not
memory. After that, every token is one step of a decoder (`decode.py`), which reads only the
weights that matter. The session keeps the KV cache between generations, so a conversation is
never computed twice.
"""

import math
import operator
import time
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

import torch

from cli.progress import Progress
from cpu.packed import PackedLinear
from decode import new_decoder, prefill
from lm_head import head_saving, logits_needed
from model import PROJECTIONS, KVCache, dense, masked
from sampling import likeliest, penalize, sample

# Prompt tokens per forward pass: this bounds the memory, and a slow CPU can report progress.
PREFILL_CHUNK = {"cuda": 2048, "cpu": 512}


@dataclass
class Stats:
    """What a session has done so far."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    steps: int = 0  # the first new token comes from prefill, every other one from a step
    decode_seconds: float = 0.0
    cache_bytes: int = 0  # keys and values read by the steps
    kept: torch.Tensor | int = 0  # rows read by the decoder's steps, int64 [n_layers, 7]
    head_rows: int = 0  # rows of the LM head read by the decoder's steps
    decoder_steps: int = 0  # on a GPU, the decoder may be a step ahead

    def __add__(self, other):
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Stats)))

    def __sub__(self, other):
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Stats)))


class Session:
    """One growing text: a model, its KV cache and how to choose the next token.

    thresholds: float32 [n_layers, 7], one per projection (in PROJECTIONS' order); None is dense
    temperature, top_k, top_p, min_p: see `sample`
    repetition_penalty: see `penalize`
    stop:       ids of the tokens that end a generation
    context:    tokens that the KV cache has room for; None for the model's longest
    head:       "auto" skips rows of the LM head where that cannot change the choice
                (lm_head.py); "whole" reads all rows: the same tokens
    graph:      on a GPU, capture the step as a CUDA graph; False gives the same tokens, slower

    Raises ValueError for an option that is out of range.
    """

    def __init__(self, model, thresholds=None, *, temperature=0.0, top_k=0, top_p=1.0,
                 min_p=0.0, repetition_penalty=1.0, seed=0, stop=(), context=None, head="auto",
                 graph=True):
        context = model.config.context if context is None else context
        for name, value, low, high, kind in (
                ("temperature", temperature, 0, 100, Real), ("top_p", top_p, 0, 1, Real),
                ("top_k", top_k, 0, math.inf, Integral), ("min_p", min_p, 0, 1, Real),
                ("repetition_penalty", repetition_penalty, 0.01, 100, Real),
                ("seed", seed, -2**63, 2**64 - 1, Integral),
                ("context", context, 1, model.config.context, Integral)):
            require(name, value, low, high, kind)
        if head not in ("auto", "whole"):
            raise ValueError(f"head is {head!r}; expected 'auto' or 'whole'")
        self.model, self.stop = model, frozenset(stop)
        generator = torch.Generator(model.device).manual_seed(seed)
        self.sampling = (temperature, top_k, top_p, min_p, generator)
        self.penalty = repetition_penalty
        # The tokens of the text so far: on the device, so that a CUDA graph can add to them.
        self.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.cache = KVCache(model.config, context, model.dtype, model.device)
        self.tokens = []  # those whose keys and values the cache holds
        self.ended = None  # what ended the last generation: "stop", "length", "context"
        self.turn = None  # marks the last generation: a new object for each
        self.stats = Stats()
        top = logits_needed(temperature, top_k, repetition_penalty) if head == "auto" else 0
        self.decoder = new_decoder(model, self.cache, self.choose, [generator], graph, top=top,
                                   seen=self.seen, penalty=repetition_penalty)
        self.set_thresholds(thresholds)

    def set_thresholds(self, thresholds):
        """Decode with these thresholds from now on (see the class)."""
        shape = self.decoder.kept.shape
        if thresholds is None:
            thresholds = torch.full(shape, -1.0)
        if thresholds.shape != shape or thresholds.isnan().any():
            raise ValueError(f"the thresholds are of shape {tuple(thresholds.shape)} or NaN; "
                             f"expected numbers of shape {tuple(shape)}")
        self.thresholds = thresholds
        self.decoder.set_thresholds(thresholds)

    def choose(self, logits):
        """Logits [V] -> the next token's id, int64 [1]; -1 tells the host of NaN or infinities."""
        if self.penalty != 1:
            logits = penalize(logits, self.seen, self.penalty)
        if self.sampling[0] == 0:
            token = likeliest(logits)
        else:
            low, high = logits.aminmax()  # NaN if one of them is
            finite = high.float() - low.float() < math.inf
            token = sample(logits, *self.sampling).masked_fill(~finite, -1)
        if self.penalty != 1:
            # -1 is not a token; nor is what a decoder leaves here while it compiles its kernels
            self.seen.index_fill_(0, token.clamp(0, len(self.seen) - 1), True)
        return token

    @torch.inference_mode()
    def read_prompt(self, tokens):
        """Run a list of ids through the model, dense, and return the id that follows them."""
        start, device = self.cache.length, self.model.device

        def chunks():
            size = PREFILL_CHUNK[device.type]
            for chunk in (tokens[i:i + size] for i in range(0, len(tokens), size)):
                yield torch.tensor(chunk, device=device)
                self.tokens += chunk  # prefill has read it, and asks for the next one
                progress.update(len(chunk))

        with Progress("reading the prompt", len(tokens), delay=2, kept=True) as progress:
            logits = prefill(self.model, self.cache, chunks())
        token = self.choose(logits).item()
        if token < 0:
            self.diagnose(tokens, start, dense)
        return token

    @torch.inference_mode()
    def diagnose(self, tokens, start, project):
        """Raise ValueError that says where `tokens`, at position `start`, turn infinite or NaN."""
        model = self.model
        end = f"is infinite or NaN at token {start + len(tokens)} of the text; " + {
            torch.float16: "float16 ends at 65504, so try --dtype bfloat16",
            torch.bfloat16: "try --dtype float32, or another checkpoint",
        }.get(model.dtype, "try another checkpoint")

        def watch(x, linear):
            y = project(x, linear)
            place = "the LM head" if linear.layer is None else (
                f"{'/'.join(PROJECTIONS[linear.places])} in layer {linear.layer}")
            for what, values in ("input", x), ("output", y):
                if not values.isfinite().all():
                    raise ValueError(f"the {what} of {place} {end}")
            return y

        self.cache.length = start
        del self.tokens[start:]
        chunks = torch.tensor(tokens, device=model.device).split(PREFILL_CHUNK[model.device.type])
        for chunk in chunks:
            hidden = model.forward(chunk, self.cache, watch)
        watch(hidden[-1:], model.lm_head)
        raise ValueError(f"a logit {end}")

    def generate(self, prompt, max_new_tokens):
        """Yield the ids that continue `prompt`, a list of ids, up to a stop token.

        The beginning that the cache already holds is not computed again, so a conversation may
        be given whole every time. Raises ValueError for a prompt that is empty, not a list of ids
        or longer than the context, and if the session has since started another generation.
        """
        stats, cache, context = self.stats, self.cache, self.cache.context
        require("max_new_tokens", max_new_tokens, 0, math.inf, Integral)
        prompt, turn = token_ids(prompt, self.model.config.vocab_size), object()
        if not prompt:
            raise ValueError("the prompt is empty; give the model at least one token to continue")
        if len(prompt) > context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than the context of {context}; shorten "
                "it, or raise --context where the model allows more")
        self.ended, self.turn = None, turn
        self.seen.zero_()
        self.seen[prompt] = True
        # The prompt's last token is read again, for its logits.
        same = common_start(self.tokens, prompt[:-1])
        cache.length, self.tokens = same, self.tokens[:same]

        start = time.perf_counter()
        try:
            token = self.read_prompt(prompt[same:])
        finally:  # after Ctrl-C, too
            stats.prompt_tokens += len(self.tokens) - same
            stats.prefill_seconds += time.perf_counter() - start
        self.decoder.start(token, cache.length)
        steps = self.decoder.tokens(min(max_new_tokens, context - len(prompt)) - 1)
        for i in range(max_new_tokens):
            if token in self.stop:
                self.ended = "stop"
                return
            stats.new_tokens += 1
            yield token
            if self.turn is not turn:
                raise ValueError("the session has started another generation, so this one cannot "
                                 "continue; give each its own session")
            if i + 1 == max_new_tokens:
                self.ended = "length"
                return
            if len(prompt) + i + 1 >= context:
                self.ended = "context"
                return
            start = time.perf_counter()
            following = next(steps)
            if following < 0:
                self.diagnose([token], cache.length, masked_by(self.thresholds))
            self.tokens.append(token)
            cache.length += 1
            token = following
            stats.decode_seconds += time.perf_counter() - start
            stats.steps += 1
            config, dtype = self.model.config, self.model.dtype
            stats.cache_bytes += seen(config, cache.length) * cache_bytes(config, dtype)
        self.ended = "length"  # max_new_tokens is 0

    @property
    def kept(self):
        """Rows read by all steps, int64 [n_layers, 7]."""
        return self.decoder.kept

    def measured(self):
        """The `Stats` of everything so far. The difference of two is what happened between."""
        return replace(self.stats, kept=self.kept.cpu().clone(), head_rows=self.decoder.head_rows(),
                       decoder_steps=self.decoder.n_steps)

    def sparsity(self, stats=None):
        """The share of the blocks' weights that a decode step does not read, on average over all
        steps, or over those of `stats`."""
        stats = stats or self.measured()
        read = block_bytes(self.model, stats.kept) / stats.decoder_steps
        return 1 - read / block_bytes(self.model)

    def bytes_per_token(self, stats=None):
        """Bytes that a decode step reads, on average: blocks, LM head, keys and values."""
        stats = stats or self.measured()
        blocks = block_bytes(self.model, stats.kept) / stats.decoder_steps
        saved = head_saving(self.model.lm_head, self.decoder.bounds,
                            stats.head_rows / stats.decoder_steps)
        return blocks + other_bytes(self.model) - saved + stats.cache_bytes / stats.steps


def masked_by(thresholds):
    """A decode step's products in plain PyTorch, as a `project` function; None is dense."""
    def project(x, linear):
        if thresholds is None or linear.layer is None:  # the LM head
            return dense(x, linear)
        return masked(x, linear, thresholds[linear.layer, linear.places].to(x.device))

    return project


def common_start(a, b):
    """How many items two lists have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def require(name, value, low, high, kind=Real):
    """Raise ValueError unless an option of this name is a number of this kind from low to high."""
    if not isinstance(value, kind) or not low <= value <= high:  # "not", so that NaN is refused
        end = f"to {high}" if high < math.inf else "on"
        raise ValueError(f"{name} is {value!r}; expected a {'whole ' * (kind is Integral)}number "
                         f"from {low} {end}")


def token_ids(ids, vocab_size):
    """A list, tuple or tensor [T] of token ids as a list. Raises ValueError for anything else."""
    try:
        if isinstance(ids, (bytes, set, dict)):  # they hold whole numbers, too
            raise TypeError
        ids = [operator.index(id) for id in ids]
    except TypeError:
        raise ValueError(f"the prompt is a {type(ids).__name__} and not a list of whole numbers; "
                         "give token ids, such as those of a tokenizer") from None
    for id in ids:
        if not 0 <= id < vocab_size:
            raise ValueError(f"the prompt holds token {id}; the model's tokens are 0 to "
                             f"{vocab_size - 1}")
    return ids


def cache_bytes(config, dtype):
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


def seen(config, n_tokens):
    """How many of n_tokens cached tokens attention reads, averaged over layers."""
    return sum(min(n_tokens, config.window(i) or n_tokens)
               for i in range(config.n_layers)) / config.n_layers


def tensors(thing):
    """The tensors that an object holds itself, such as a `Linear`'s, and its parts' if it is a
    `PackedLinear`."""
    own = [value for value in vars(thing).values() if isinstance(value, torch.Tensor)]
    return own + [tensor for part in getattr(thing, "parts", ()) for tensor in tensors(part)]


def bytes_per_weight(linear, i):
    """Bytes that decoding reads for one weight of a kept row of projection i, scales within the row
    included."""
    if isinstance(linear, PackedLinear):
        return linear.parts[i].words.nbytes / linear.in_features / linear.widths[i]
    by_row = sum(tensor.nbytes for tensor in tensors(linear) if tensor.dim() > 1)
    return by_row / linear.in_features / linear.ends[-1]


def other_bytes(model):
    """Bytes of weights that every step reads besides the blocks' rows: the LM head, norms, biases,
    the scales of columns and of groups of rows, and one row of an untied embedding."""
    holders = [*model.blocks, *model.linears()]
    vectors = [tensor for holder in holders for tensor in tensors(holder) if tensor.dim() == 1]
    of_groups = [tensor for linear in model.linears() for part in getattr(linear, "parts", ())
                 for tensor in (part.scale, part.minimum) if tensor is not None]
    embedding = [] if model.embedding is None else [model.embedding[torch.tensor([0])]]
    every_step = [*vectors, *of_groups, *tensors(model.lm_head), model.norm, *embedding]
    return sum(tensor.nbytes for tensor in every_step)


def block_bytes(model, kept=None):
    """Bytes of the blocks' weights, or of `kept` rows of every projection, int64 [n_layers, 7]."""
    total, kept = 0, None if kept is None else kept.tolist()  # one wait for the GPU
    for linear in model.linears():
        rows = [linear.in_features] * len(linear.widths)
        if kept is not None:
            rows = kept[linear.layer][linear.places]
        total += sum(n * width * bytes_per_weight(linear, i)
                     for i, (n, width) in enumerate(zip(rows, linear.widths)))
    return total
