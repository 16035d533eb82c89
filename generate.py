"""Generates text: prefill, then one token at a time, each decode step reading only the weight rows that matter.

Prefill takes the whole prompt through the model at once, dense: its time is arithmetic, not memory. After that every
token is one forward pass with T = 1, whose time is reading the weights, and that is where sparsity pays: `Session`
gives `model.forward` another way to multiply, with the calibrated thresholds of each projection. The choice of the
next token, `sample`, uses tensor operations only and never waits for the device.

Method: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL, arXiv:2408.14690).

    python generate.py --sparsity 0.4 --prompt "Explain in one sentence why the sky is blue."
    python generate.py --chat --model meta-llama/Llama-3.2-1B-Instruct --sparsity 0.5
"""

import argparse
import functools
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass

# Before PyTorch starts OpenMP: threads that spin while waiting for each other, as they do for long by default, make
# decoding several times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from calibration import CalibrationError, cache_path, find
from checkpoint import load, one_line
from memory import free_memory
from model import PROJECTIONS, SITES, KVCache, dense
from sparse_gemv import CpuGemv
from tokenizer import TextStream

PREFILL_CHUNK = 2048  # prompt tokens that go through the model at once, so that memory stays bounded


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Logits [V] -> a token id, int64 [1]; tensor operations of fixed shapes only, so a CUDA graph can hold them.

    temperature: divides the logits; 0 takes the likeliest token
    top_k:       only the k likeliest tokens; 0 for all
    top_p:       of those, only the likeliest ones that together reach this probability; 1 for all
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits.float(), None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # likeliest first
    elif top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    # Less the largest first, or a tiny temperature makes infinities; float64, or many tiny probabilities add up wrong.
    probabilities = ((logits - logits.amax()) / temperature).softmax(-1, dtype=torch.float64)
    if top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities  # the probability of all tokens before this one
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    # Of exponential clocks with these rates, each rings first with its probability: a draw without a host's decision.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / clocks).argmax(-1, keepdim=True)
    return choice if ids is None else ids.gather(-1, choice)


@dataclass
class Stats:
    """What a session has done so far."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    steps: int = 0  # forward passes of one token; the first new token comes from prefill
    decode_seconds: float = 0.0
    cache_bytes: int = 0  # keys and values read by the steps


class Session:
    """One growing text: a model, its KV cache and how to choose the next token.

    thresholds: float32 [n_layers, 7], one for each projection (order PROJECTIONS); None decodes densely
    context:    tokens the KV cache can hold; None for the model's longest
    graph:      on a GPU, capture the decode step as a CUDA graph; False runs it kernel by kernel, to the same tokens
    """

    def __init__(self, model, thresholds=None, *, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=(), context=None,
                 graph=True):
        config = model.config
        self.model, self.stop = model, frozenset(stop)
        generator = torch.Generator(model.device).manual_seed(seed)
        self.sampling = (temperature, top_k, top_p, generator)
        self.cache = KVCache(config, context or config.context, model.dtype, model.device)
        self.tokens = []  # those whose keys and values the cache holds
        self.full = False  # whether the last generation ended because the context did
        self.stats = Stats()
        self.decoder = None
        if model.device.type == "cuda":
            from decode import Decoder

            self.decoder = Decoder(model, self.cache, self.choose, [generator], graph)
            self.kept = self.decoder.kept
        else:
            self.kept = torch.zeros(config.n_layers, len(PROJECTIONS), dtype=torch.int64)  # rows read by all steps
            self.counts = torch.zeros_like(self.kept)  # and by the present one
        self.set_thresholds(thresholds)

    def set_thresholds(self, thresholds):
        """Decode with these thresholds from now on (see the class)."""
        if thresholds is None:
            thresholds = torch.full(self.kept.shape, -1.0)
        if self.decoder is not None:
            self.decoder.thresholds.copy_(thresholds)
            return
        self.products = {self.model.lm_head: CpuGemv(self.model.lm_head.w_t, -1.0)}
        for layer, row, counts in zip(self.model.layers, thresholds.tolist(), self.counts):
            for site, names in SITES.items():
                columns = slice(PROJECTIONS.index(names[0]), PROJECTIONS.index(names[-1]) + 1)
                p = getattr(layer, site)
                self.products[p] = CpuGemv(p.w_t, list(zip(p.ends, row[columns])), counts[columns])

    def multiply(self, x, p):
        """x [1, K] times a projection -> [1, N], reading only the rows that matter; all of them without thresholds."""
        if self.decoder is not None or p is self.model.lm_head and p.w_t.dtype == torch.float32:
            return dense(x, p)  # a GPU's steps are the decoder's; on a CPU, the ordinary product is the faster one here
        y = self.products[p](x)
        if p.scale is not None:
            y = y * p.scale
        return (y if p.bias is None else y + p.bias).to(x.dtype)

    def choose(self, logits):
        """Logits [V] -> the next token's id, int64 [1]; or -1 if they are not finite, which the host then sees."""
        low, high = logits.aminmax()  # NaN if one of them is
        return sample(logits, *self.sampling).masked_fill(~(high.float() - low.float() < math.inf), -1)

    @torch.inference_mode()
    def diagnose(self, tokens, start, project):
        """Raise ValueError naming where `tokens`, after `start` others in the cache, give infinite or NaN numbers."""
        model = self.model
        end = f"is infinite or NaN at token {start + len(tokens)} of the text; " + {
            torch.float16: "float16 ends at 65504, so try --dtype bfloat16",
            torch.bfloat16: "try --dtype float32, or another checkpoint"}.get(model.dtype, "try another checkpoint")

        def watch(x, p):
            y = project(x, p)
            place = "the LM head" if p.layer is None else f"{'/'.join(SITES[p.site])} in layer {p.layer}"
            for what, values in ("input", x), ("output", y):
                if not values.isfinite().all():
                    raise ValueError(f"the {what} of {place} {end}")
            return y

        self.cache.length = start
        for chunk in torch.tensor(tokens, device=model.device).split(PREFILL_CHUNK):
            hidden = model.forward(chunk, self.cache, watch)
        watch(hidden[-1:], model.lm_head)
        raise ValueError(f"a logit {end}")

    @torch.inference_mode()
    def next_token(self, tokens, project):
        """Run token ids through the model and choose the id that follows them."""
        model, device, start = self.model, self.model.device, self.cache.length
        for chunk in torch.tensor(tokens, device=device).split(PREFILL_CHUNK):
            hidden = model.forward(chunk, self.cache, project)
        token = self.choose(model.logits(hidden[-1:], self.multiply)[0]).item()
        if token < 0:
            self.diagnose(tokens, start, project)
        self.tokens += tokens
        return token

    def steps(self, token, n):
        """Yield the n token ids that follow `token`, each from one decode step."""
        if self.decoder is None:
            for _ in range(n):
                self.counts.zero_()  # of a step that Ctrl-C cut short
                token = self.next_token([token], self.multiply)
                self.kept += self.counts
                yield token
        else:
            self.decoder.start(token, self.cache.length)
            for following in self.decoder.tokens(n):
                if following < 0:
                    self.diagnose([token], self.cache.length, self.multiply)
                self.tokens.append(token)
                self.cache.length += 1
                token = following
                yield token

    def generate(self, prompt, max_new_tokens):
        """A generator of the token ids that continue `prompt`, a list of ids, up to and without a stop token.

        What the cache holds of the prompt's beginning is not computed again, so a conversation may be given whole
        every time. Raises ValueError for a prompt that is empty or longer than the context.
        """
        stats, cache, context = self.stats, self.cache, self.cache.context
        if not prompt:
            raise ValueError("the prompt is empty; give the model at least one token to continue")
        if len(prompt) > context:
            raise ValueError(f"the prompt has {len(prompt)} tokens, more than the context of {context}; shorten it, "
                             "or raise --context where the model allows more")
        self.full = False
        same = 0
        while same < min(len(self.tokens), len(prompt) - 1) and self.tokens[same] == prompt[same]:
            same += 1
        cache.length, self.tokens = same, self.tokens[:same]

        start = time.perf_counter()
        token = self.next_token(prompt[same:], dense)
        stats.prompt_tokens += len(prompt) - same
        stats.prefill_seconds += time.perf_counter() - start
        steps = self.steps(token, min(max_new_tokens, context - len(prompt)) - 1)
        for i in range(max_new_tokens):
            if token in self.stop:
                return
            stats.new_tokens += 1
            yield token
            if i + 1 == max_new_tokens:
                return
            self.full = len(prompt) + i + 1 >= context
            if self.full:
                return
            start = time.perf_counter()
            token = next(steps)
            stats.decode_seconds += time.perf_counter() - start
            stats.steps += 1
            seen = min(cache.length, self.model.config.sliding_window or cache.length)
            stats.cache_bytes += seen * 2 * cache.k[:, :, 0].nbytes

    def sparsity(self):
        """The share of the blocks' weights that a decode step does not read, on average."""
        return 1 - self.model.block_bytes(self.kept) / self.n_counted() / self.model.block_bytes()

    def bytes_per_token(self):
        """Bytes that a decode step reads, on average: weights of the blocks, LM head, keys and values."""
        blocks = self.model.block_bytes(self.kept) / self.n_counted()
        return self.model.lm_head.w_t.nbytes + blocks + self.stats.cache_bytes / self.stats.steps

    def n_counted(self):
        """The steps that `kept` counts: a GPU is one ahead of the text."""
        return self.stats.steps if self.decoder is None else self.decoder.n_steps


def generate(model, prompt, max_new_tokens, **options):
    """A generator of the token ids that continue `prompt`, a list of ids; `options` are those of Session."""
    context = min(model.config.context, len(prompt) + max_new_tokens)
    yield from Session(model, **{"context": context} | options).generate(prompt, max_new_tokens)


# ---- command line --------------------------------------------------------------------------------------------------

def thresholds(model, tokenizer, args, sparsity):
    """Thresholds [n_layers, 7] for a sparsity, calibrating the model first if nobody has; None for dense."""
    if sparsity == 0:
        return None
    import calibrate  # which needs this file

    folder = args.model if args.model and os.path.isdir(args.model) else None
    calibration = find(model, path=args.calibration, folder=folder)
    if calibration is None:
        path = cache_path(model)
        print(f"no calibration for this model yet; making one, once, into {path}", file=sys.stderr)
        text = calibrate.write_text(model, tokenizer, n_tokens=8192)
        calibration = calibrate.calibrate(model, text, min(1024, model.config.context), source="self-written, seed 0")
        try:
            calibration.save(path)
        except CalibrationError as error:
            print(f"{error}; this run goes on, and the next one will calibrate again", file=sys.stderr)
    return calibration.thresholds(sparsity)


def write(ids, tokenizer):
    """Print token ids as text while they come, whole characters only, until they end or Ctrl-C; returns the text."""
    stream, text = TextStream(tokenizer), ""
    try:
        for id in ids:
            text += (piece := stream.push(id))
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    text += (piece := stream.flush())
    print(piece, flush=True)
    return text


def chat(session, tokenizer, max_new_tokens, question, set_sparsity):
    """Answer `question`, if not None, then line after line of standard input; the conversation stays in the cache.

    A line "/sparsity 0.5" changes the sparsity from there on instead.
    """
    messages = []
    while not session.full:
        if question is None:
            try:
                question = input("> " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                print()
                return
        if question.startswith("/sparsity "):
            try:
                set_sparsity(number(float, 0, 0.95)(question.split(maxsplit=1)[1]))
            except argparse.ArgumentTypeError as error:
                print(error, file=sys.stderr)
            question = None
            continue
        messages.append({"role": "user", "content": question})
        ids = tokenizer.chat(messages)
        if len(ids) > session.cache.context:
            session.full = True
            return
        answer = write(session.generate(ids, max_new_tokens), tokenizer)
        messages.append({"role": "assistant", "content": answer})
        question = None


def summary(session, args):
    """What happened, in one line."""
    stats = session.stats
    prefill = f", {stats.prompt_tokens / stats.prefill_seconds:.1f} tok/s" if stats.prompt_tokens else ""
    decode = f", {stats.steps / stats.decode_seconds:.1f} tok/s" if stats.steps else ""
    parts = [f"prompt {stats.prompt_tokens} tokens{prefill}", f"new {stats.new_tokens} tokens{decode}"]
    if stats.steps:
        parts += [f"sparsity {args.sparsity:g} asked, {session.sparsity():.3f} realised",
                  f"{session.bytes_per_token() / 1e6:.1f} MB read per token"]
    if args.temperature > 0:
        parts.append(f"seed {args.seed}")
    return " | ".join(parts)


def number(kind, low, high):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one sentence, where argparse would print the usage as well
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(doc):
    """A parser for a script with this docstring: its first sentence, flags in groups, and the examples at its end."""
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110)
    return Parser(description=doc.split("\n\n")[0], epilog="examples:\n" + doc.rpartition("\n\n")[2],
                  formatter_class=layout)


def parse_args():
    parser = make_parser(__doc__)
    many = 2**31 - 1
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="M", help="Hugging Face folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
        help="of weights and arithmetic (default: %(default)s)")
    add("--quantize", choices=("int8",), help="hold the weights as int8: half the bytes of bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--no-graph", action="store_true", help="on a GPU, launch the kernels one by one: the same text, slower")
    add("--context", type=number(int, 1, many), metavar="N",
        help="longest text, prompt and answers, that memory is set aside for (default: the model's longest that fits)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--sparsity", type=number(float, 0, 0.95), default=0.0, metavar="S",
        help="share of the blocks' weights that decoding leaves unread, 0 to 0.95 (default: %(default)s)")
    add("--calibration", metavar="FILE",
        help="thresholds from calibrate.py (default: those of this model, made if need be)")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", metavar="TEXT", help="what to answer; - reads it from standard input")
    add("--chat", action="store_true",
        help="hold a conversation: answer every line of standard input; the line /sparsity S changes the sparsity")
    add("--raw", action="store_true", help="continue the prompt as it is, without the model's chat template")
    add("--max-new-tokens", type=number(int, 1, many), default=256, metavar="N",
        help="for each answer (default: %(default)s)")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=number(float, 0, 100), default=0.7, metavar="T",
        help="higher is more random, 0 always takes the likeliest token (default: %(default)s)")
    add("--top-k", type=number(int, 0, many), default=50, metavar="K",
        help="choose among the K likeliest tokens, 0 for all (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1), default=0.95, metavar="P",
        help="choose among the likeliest tokens that together have probability P (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="same seed, same text (default: a new one, which the summary names)")
    args = parser.parse_args()
    if args.chat and args.raw:
        parser.error("--chat needs the chat template that --raw switches off; give one of them")
    if args.prompt is None and not args.chat:
        parser.error("there is nothing to do; give --prompt TEXT, --prompt - to read standard input, or --chat")
    if sys.stdin is None and (args.chat or args.prompt == "-"):
        parser.error("standard input is closed; give --prompt TEXT")
    try:
        usable = torch.device(args.device).type in ("cpu", "cuda") and torch.empty(0, device=args.device) is not None
    except (RuntimeError, AssertionError):  # the latter from a PyTorch without CUDA
        usable = False
    if not usable:
        parser.error(f"device {args.device!r} is not available; try --device cpu")
    if args.seed is None:
        args.seed = secrets.randbits(32)
    return args


def run(args):
    """Load, generate, and say on standard error how it went."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = load(args.model, dtype=getattr(torch, args.dtype), device=args.device, quantize=args.quantize,
                            context=args.context)
    context, ids = model.config.context, []
    if not args.chat:
        use_template = tokenizer.has_chat_template and not args.raw
        ids = tokenizer.chat([{"role": "user", "content": prompt}]) if use_template else tokenizer.encode(prompt)
        context = min(context, len(ids) + args.max_new_tokens)
    elif args.context is None:  # up to half of what is free; too little for even 512 is an error
        fits = int(min(free_memory(model.device) / 2 / KVCache.token_bytes(model.config, model.dtype), context))
        context = min(context, max(fits, 512))
    session = Session(model, thresholds(model, tokenizer, args, args.sparsity), context=context, seed=args.seed,
                      temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, stop=tokenizer.eos_ids,
                      graph=not args.no_graph)

    def set_sparsity(sparsity):
        session.set_thresholds(thresholds(model, tokenizer, args, sparsity))
        args.sparsity = sparsity  # what the summary says was asked

    if args.chat:
        chat(session, tokenizer, args.max_new_tokens, prompt, set_sparsity)
    else:
        write(session.generate(ids, args.max_new_tokens), tokenizer)
    if session.full:
        print(f"the context of {context} tokens is full, so the text ends here", file=sys.stderr)
    print(summary(session, args), file=sys.stderr)


def main():
    args = parse_args()
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left; Python must not flush into the void at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        free = free_memory(torch.device(args.device)) / 1e9
        print(f"generate.py: error: out of memory, with {free:.1f} GB free now ({one_line(error)}); "
              "try --dtype bfloat16, --quantize int8 or a shorter --context", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
