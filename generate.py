"""Generates text, each decode step reading only the weight rows that matter.

The command line and the Python API. The pieces behind them, in reading order: `model.py` (the
forward pass and the idea), `sparse_gemv.py` (the kernel), `decode.py` (one step), `session.py`
(one text).

Method: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL,
arXiv:2408.14690).

    python generate.py --sparsity 0.4 --prompt "Explain in one sentence why the sky is blue."
    python generate.py --chat --model meta-llama/Llama-3.2-1B-Instruct --sparsity 0.5
"""

import argparse
import os
import secrets
import sys

# Before PyTorch starts OpenMP: threads that spin for long while they wait for each other, the
# default, make decoding several times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import calibrate
from checkpoint.memory import free_memory, require_memory
from checkpoint.tokenizer import TextStream
from command_line import add_model_flags, load_model, make_parser, number, run_script
from model import KVCache
from session import Session, SparsityWatch
from tensor_parallel import from_first, rank, refuse
from thresholds import CalibrationError, cache_path, find


def generate(model, prompt, max_new_tokens, **options):
    """A generator of the ids that continue `prompt`, a list of ids; options as of `Session`."""
    context = min(model.config.context, len(prompt) + max_new_tokens)
    session = open_session(model, **{"context": context} | options)
    yield from session.generate(prompt, max_new_tokens)


def open_session(model, thresholds=None, *, context, **options):
    """A `Session` with these arguments. Raises ValueError if its KV cache does not fit into
    memory."""
    advice = "" if model.dtype.itemsize == 2 else " or --dtype bfloat16"
    require_memory(context * KVCache.bytes_per_token(model.config, model.dtype), model.device,
                   f"a context of {context} tokens", f"try a shorter one with --context{advice}")
    return Session(model, thresholds, context=context, **options)


def find_thresholds(model, tokenizer, args, sparsity):
    """Thresholds [n_layers, 7] for a sparsity; calibrates a model that nobody has; None for
    dense."""
    if sparsity == 0:
        return None
    calibration = find(model, path=args.calibration)
    if calibration is not None and not calibration.is_own(model):
        own = "calibrate.py" + (f" --model {args.model}" if args.model else "")
        print(f"thresholds: {calibration.origin()}, made for other weights of this shape; "
              f"python {own} makes this model's own", file=sys.stderr)
    if calibration is None:
        refuse("the calibration of a new model")
        path = cache_path(model)
        print(f"no calibration for this model yet; making one, once, into {path}", file=sys.stderr)
        text = calibrate.write_text(model, tokenizer, n_tokens=8192)
        window = min(1024, model.config.context)
        calibration = calibrate.calibrate(model, text, window, source="self-written, seed 0")
        try:
            calibration.save(path)
        except CalibrationError as error:
            print(f"{error}; this run goes on, and the next one will calibrate again",
                  file=sys.stderr)
    return calibration.thresholds(sparsity)


# ---- printing and chat -------------------------------------------------------------------------

def write(ids, tokenizer):
    """Print token ids as text while they come, until they end or Ctrl-C; returns the text."""
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


def chat(session, tokenizer, respond, question, set_sparsity):
    """Answer `question`, if not None, then line after line of standard input.

    The conversation stays in the cache. A line "/sparsity 0.5" changes the sparsity instead.
    """
    messages = []
    while not session.full:
        if question is None:
            try:
                question = input("> " if sys.stdin.isatty() else "") if rank() == 0 else None
            except (EOFError, KeyboardInterrupt):
                print()
            question = from_first(question)
            if question is None:
                return
        if question.startswith("/sparsity"):
            try:
                set_sparsity(number(float, 0, 0.95)(question.removeprefix("/sparsity").strip()))
            except argparse.ArgumentTypeError as error:
                print(error, file=sys.stderr)
            question = None
            continue
        messages.append({"role": "user", "content": question})
        ids = tokenizer.chat(messages)
        if len(ids) > session.cache.context:
            session.full = True
            return
        answer = respond(ids)
        messages.append({"role": "assistant", "content": answer})
        question = None


def warn_of_sparsity(asked, reached):
    print(f"\nwarning: sparsity {asked:g} was asked, and the last {SparsityWatch.STEPS} tokens "
          f"reached {reached:.3f}; the calibration does not fit these weights or this text",
          file=sys.stderr)


def summary(session, args):
    """What happened, in one line."""
    stats = session.stats
    prompt, new = f"prompt {stats.prompt_tokens} tokens", f"new {stats.new_tokens} tokens"
    if stats.prompt_tokens:
        prompt += f", {stats.prompt_tokens / stats.prefill_seconds:.1f} tok/s"
    if stats.steps:
        new += f", {stats.steps / stats.decode_seconds:.1f} tok/s"
    parts = [prompt, new]
    if stats.steps:
        parts += [f"sparsity {args.sparsity:g} asked, {session.sparsity():.3f} realised",
                  f"{session.bytes_per_token() / 1e6:.1f} MB read per token"]
    if args.temperature > 0:
        parts.append(f"seed {args.seed}")
    return " | ".join(parts)


# ---- the command line --------------------------------------------------------------------------

def parse_args():
    parser, many = make_parser(__doc__), 2**31 - 1
    add = add_model_flags(parser, dtype="bfloat16")
    add("--no-graph", action="store_true",
        help="on a GPU, launch the kernels one by one: the same text, slower")
    add("--context", type=number(int, 1, many), metavar="N",
        help="longest text, prompt and answers, that memory is set aside for (default: the "
             "model's longest that fits)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--sparsity", type=number(float, 0, 0.95), default=0.0, metavar="S",
        help="share of the blocks' weights that decoding leaves unread, 0 to 0.95 "
             "(default: %(default)s)")
    add("--calibration", metavar="FILE",
        help="thresholds from calibrate.py (default: those of this model, made if need be)")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", metavar="TEXT", help="what to answer; - reads it from standard input")
    add("--chat", action="store_true",
        help="hold a conversation: answer every line of standard input; the line /sparsity S "
             "changes the sparsity")
    add("--raw", action="store_true",
        help="continue the prompt as it is, without the model's chat template")
    add("--max-new-tokens", type=number(int, 1, many), default=256, metavar="N",
        help="for each answer (default: %(default)s)")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=number(float, 0, 100), default=0.7, metavar="T",
        help="higher is more random, 0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=number(int, 0, many), default=50, metavar="K",
        help="choose among the K likeliest tokens, 0 for all (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1), default=0.95, metavar="P",
        help="choose among the likeliest tokens that together have probability P "
             "(default: %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="same seed, same text (default: a new one, which the summary names)")
    args = parser.parse_args()
    if args.chat and args.raw:
        parser.error("--chat needs the chat template that --raw switches off; give one of them")
    if args.prompt is None and not args.chat:
        parser.error("there is nothing to do; give --prompt TEXT, --prompt - to read standard "
                     "input, or --chat")
    if sys.stdin is None and (args.chat or args.prompt == "-"):
        parser.error("standard input is closed; give --prompt TEXT")
    if args.seed is None:
        args.seed = secrets.randbits(32)
    return args


def main():
    """Load, generate, and say on standard error how it went."""
    args = parse_args()
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.read() if rank() == 0 else None
    model, tokenizer = load_model(args, context=args.context)
    prompt, args.seed = from_first((prompt, args.seed))
    context, ids = model.config.context, []
    if not args.chat:
        if tokenizer.has_chat_template and not args.raw:
            ids = tokenizer.chat([{"role": "user", "content": prompt}])
        else:
            ids = tokenizer.encode(prompt)
        context = min(context, len(ids) + args.max_new_tokens)
    elif args.context is None:  # up to half of what is free; too little for even 512 is an error
        token = KVCache.bytes_per_token(model.config, model.dtype)
        fits = int(min(free_memory(model.device) / 2 / token, context))
        context = min(context, max(fits, 512))
    session = open_session(
        model, find_thresholds(model, tokenizer, args, args.sparsity), context=context,
        seed=args.seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        stop=tokenizer.eos_ids, graph=not args.no_graph)

    def set_sparsity(sparsity):
        session.set_thresholds(find_thresholds(model, tokenizer, args, sparsity))
        args.sparsity = sparsity  # what the summary says was asked

    watch = SparsityWatch(session, warn_of_sparsity)

    def respond(ids):
        ids = session.generate(ids, args.max_new_tokens)
        return write(watch.watch(ids, args.sparsity), tokenizer)

    if args.chat:
        chat(session, tokenizer, respond, prompt, set_sparsity)
    else:
        respond(ids)
    if session.full:
        print(f"the context of {context} tokens is full, so the text ends here", file=sys.stderr)
    print(summary(session, args), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
