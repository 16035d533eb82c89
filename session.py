"""One growing text: prefill, then token after token from a decoder, counting what is read.

After the prompt, every token is one step of a decoder (`decode.py`), which reads only the weights
that matter. The session keeps the KV cache between generations, so a conversation is never
recomputed.
"""

import math
import time
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

import torch

from cli.accounting import block_bytes, cache_bytes, other_bytes, tokens_attended
from cli.checks import require, token_ids
from cli.progress import progress
from decode import new_decoder, prefill
from lm_head import head_saving, logits_needed
from model import KVCache
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

    thresholds: float32 [n_layers, 7], one per projection (in PROJECTIONS' order), from calibrate.py
                (examples/idea.py shows the simplest way); None is dense
    temperature, top_k, top_p, min_p: see `sample`
    repetition_penalty: see `penalize`
    stop:       ids of the tokens that end a generation
    context:    tokens that the KV cache has room for; None for the model's longest
    head:       "auto" skips rows of the LM head that cannot change the choice (lm_head.py);
                "whole" reads all rows

    Raises ValueError for an option that is out of range.
    """

    def __init__(self, model, thresholds=None, *, temperature=0.0, top_k=0, top_p=1.0,
                 min_p=0.0, repetition_penalty=1.0, seed=0, stop=(), context=None, head="auto"):
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
        self.latest = None  # a new object for each generation, to notice that another has begun
        self.stats = Stats()
        # how many of the largest logits matter; 0 for all
        top = logits_needed(temperature, top_k, repetition_penalty) if head == "auto" else 0
        self.decoder = new_decoder(model, self.cache, self.choose, [generator], top=top,
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
        """Logits [V] -> the next token's id, int64 [1]; -1 if they are infinite or NaN."""
        if self.penalty != 1:
            logits = penalize(logits, self.seen, self.penalty)
        if self.sampling[0] == 0:
            token = likeliest(logits)  # gives -1 for these on its own
        else:
            low, high = logits.aminmax()  # both NaN if any logit is; NaN < inf is false
            finite = high.float() - low.float() < math.inf
            token = sample(logits, *self.sampling).masked_fill(~finite, -1)
        if self.penalty != 1:
            # clamp: -1 is no token, and while a GPU decoder compiles, the choice is arbitrary
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
                self.tokens += chunk  # runs once prefill asks on: Ctrl-C may fall before that
                bar.update(len(chunk))

        with progress("reading the prompt", len(tokens), delay=2) as bar:
            logits = prefill(self.model, self.cache, chunks())
        token = self.choose(logits).item()
        if token < 0:
            self.cache.length = start
            del self.tokens[start:]
            raise self.overflow(start + len(tokens))
        return token

    def overflow(self, n_tokens):
        """What to raise where the logits after n_tokens of the text are infinite or NaN."""
        advice = {torch.float16: "float16 ends at 65504, so try --dtype bfloat16",
                  torch.bfloat16: "try --dtype float32, or another checkpoint"}
        return ValueError(f"a logit is infinite or NaN at token {n_tokens} of the text; "
                          + advice.get(self.model.dtype, "try another checkpoint"))

    def generate(self, prompt, max_new_tokens):
        """Yield the ids that continue `prompt`, a list of ids, up to a stop token.

        The beginning that the cache already holds is not computed again, so a conversation may
        be given whole every time. Raises ValueError for a prompt that is empty, not a list of ids
        or longer than the context, and if the session has since started another generation.
        """
        stats, cache, context = self.stats, self.cache, self.cache.context
        require("max_new_tokens", max_new_tokens, 0, math.inf, Integral)
        prompt, this = token_ids(prompt, self.model.config.vocab_size), object()
        if not prompt:
            raise ValueError("the prompt is empty; give the model at least one token to continue")
        if len(prompt) > context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than the context of {context}; shorten "
                "it, or raise --context where the model allows more")
        self.ended, self.latest = None, this
        self.seen.zero_()
        self.seen[prompt] = True
        # The prompt's last token is always read again: the cache does not hold its logits.
        same = common_start(self.tokens, prompt[:-1])
        cache.length, self.tokens = same, self.tokens[:same]

        start = time.perf_counter()
        try:
            token = self.read_prompt(prompt[same:])
        finally:  # after Ctrl-C, too
            stats.prompt_tokens += len(self.tokens) - same
            stats.prefill_seconds += time.perf_counter() - start
        self.decoder.start(token, cache.length)
        # The text ends where the context does; a prompt that fills it still gets prefill's token.
        n_new = min(max_new_tokens, max(1, context - len(prompt)))
        steps = self.decoder.tokens(n_new - 1)  # the prompt gave the first token
        for i in range(n_new):
            if token in self.stop:
                self.ended = "stop"
                return
            stats.new_tokens += 1
            yield token
            if self.latest is not this:
                raise ValueError("the session has started another generation, so this one cannot "
                                 "continue; give each its own session")
            if i + 1 == n_new:
                break
            start = time.perf_counter()
            following = next(steps)
            if following < 0:
                raise self.overflow(cache.length + 1)
            self.tokens.append(token)
            cache.length += 1  # counted here: a GPU's decoder may be a token ahead
            token = following
            stats.decode_seconds += time.perf_counter() - start
            stats.steps += 1
            config, dtype = self.model.config, self.model.dtype
            stats.cache_bytes += tokens_attended(config, cache.length) * cache_bytes(config, dtype)
        self.ended = "length" if n_new == max_new_tokens else "context"

    def measured(self):
        """The `Stats` of everything so far. The difference of two is what happened between."""
        return replace(self.stats, kept=self.decoder.kept.cpu().clone(),
                       head_rows=self.decoder.head_rows(), decoder_steps=self.decoder.n_steps)

    def sparsity(self, stats=None):
        """The share of the blocks' weights that a decode step does not read, averaged over all
        steps, or over those of `stats`."""
        stats = stats or self.measured()
        read = block_bytes(self.model, stats.kept) / stats.decoder_steps
        return 1 - read / block_bytes(self.model)

    def bytes_per_token(self, stats=None):
        """Bytes that a decode step reads, averaged as in `sparsity`: blocks, head, keys, values."""
        stats = stats or self.measured()
        blocks = block_bytes(self.model, stats.kept) / stats.decoder_steps
        saved = head_saving(self.model.lm_head, self.decoder.bounds,
                            stats.head_rows / stats.decoder_steps)
        return blocks + other_bytes(self.model) - saved + stats.cache_bytes / stats.steps


def common_start(a, b):
    """How many items two lists have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
