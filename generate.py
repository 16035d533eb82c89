"""Generates text, reading in each decode step only the weight rows that matter.

The command line and the Python API. Behind them: `session.py` (one text), `cli/chat.py` (a
conversation).

    python generate.py --sparsity 0.4 --prompt "Explain in one sentence why the sky is blue."
    python generate.py --chat --model meta-llama/Llama-3.2-1B-Instruct --sparsity 0.5
"""

import argparse
import json
import math
import os
import secrets
import shlex
import sys
from numbers import Integral

# Before PyTorch starts OpenMP: threads that spin for a long time while they wait for each other, as
# they do by default, make decoding several times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

import calibrate
from calibrations.thresholds import CalibrationError, cache_path, find
from checkpoint.files import read_input
from checkpoint.memory import free_memory, require_memory
from checkpoint.tokenizer import text_pieces
from cli.accounting import cache_bytes
from cli.chat import Chat, edit_lines
from cli.checks import require, token_ids
from cli.command_line import (
    COUNT,
    SHARE,
    add_model_flags,
    between,
    load_model,
    make_parser,
    run_script,
)
from cli.report import explain_end, report, say, summary, warn_of_sparsity, write
from session import Session
from tensor_parallel import from_first, rank, require_one_process

# Defaults where a checkpoint recommends nothing.
SAMPLING = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.0,
            "repetition_penalty": 1.0}


# ---- the Python API ----------------------------------------------------------------------------

def generate(model, tokenizer, prompt, max_new_tokens=256, *, sparsity=0.0, calibration=None,
             stop=(), **options):
    """Yield the text that continues `prompt`, in pieces of about a word.

    prompt:      text to continue, or ids to answer, such as those of `tokenizer.chat`
    sparsity:    share of the blocks' weights that decoding skips, 0 to 0.95
    calibration: a file of thresholds; None uses this model's, and calibrates it if need be
    stop:        a text, or several, that ends the answer and is not part of it
    options:     temperature and others, see `Session`

    Raises ValueError with a message of one sentence.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(text and isinstance(text, str) for text in stop):
        raise ValueError(f"stop is {stop}; expected texts of at least one character")
    # text_pieces decodes a continuation with its prompt, for the right spaces; an answer, alone
    if isinstance(prompt, str):
        ids = continued = tokenizer.encode(prompt)
    else:
        ids, continued = prompt, ()
    thresholds = find_thresholds(model, tokenizer, sparsity, calibration)
    new = generate_tokens(model, ids, max_new_tokens, thresholds=thresholds,
                          stop=tokenizer.eos_ids, **options)
    yield from text_pieces(new, tokenizer, stop, continued)


def generate_tokens(model, ids, max_new_tokens, **options):
    """Yield the ids that continue `ids`, a list; options as for `Session`."""
    require("max_new_tokens", max_new_tokens, 0, math.inf, Integral)
    ids = token_ids(ids, model.config.vocab_size)
    context = max(1, min(model.config.context, len(ids) + max_new_tokens))
    session = open_session(model, **{"context": context} | options)
    yield from session.generate(ids, max_new_tokens)


def open_session(model, thresholds=None, *, context, **options):
    """A `Session` with these arguments. Raises ValueError if its KV cache does not fit into memory.
    If only the LM head's certificate (its int8 copy, lm_head.py) does not, decoding reads the whole
    head."""
    advice = "" if model.dtype.itemsize == 2 else " or --dtype bfloat16"
    require_memory(context * cache_bytes(model.config, model.dtype), model.device,
                   f"a context of {context} tokens", f"try a shorter one with --context{advice}")
    certificate = model.config.vocab_size * (model.config.hidden_size + 3 * 4)  # int8, 3 float32
    if context * cache_bytes(model.config, model.dtype) + certificate > free_memory(model.device):
        options["head"] = "whole"
    return Session(model, thresholds, context=context, **options)


def find_thresholds(model, tokenizer, sparsity, path=None, name=None):
    """Thresholds [n_layers, 7] for a sparsity, None for dense.

    They come from the calibration file `path`, or from the best available calibration (see
    calibrations/thresholds.py). A model without one is calibrated. `name` is the value of --model.
    """
    require("sparsity", sparsity, 0, 0.95)
    if sparsity == 0:
        return None
    calibration = find(model, path=path)
    if calibration is not None and not calibration.is_own(model):
        command = "python calibrate.py" + (f" --model {shlex.quote(name)}" if name else "")
        say(f"thresholds: {calibration.origin()}, made for other weights of this shape; "
            f"{command} makes this model's own")
    if calibration is None:
        require_one_process("the calibration of a new model")
        path = cache_path(model)
        say(f"no calibration for this model yet; making one, once, into {path}")
        calibration = calibrate.calibrate_briefly(model, tokenizer)
        try:
            calibration.save(path)
        except CalibrationError as error:
            say(f"{error}; this run goes on, and the next one will calibrate again")
    return calibration.thresholds(sparsity)


# ---- the command line --------------------------------------------------------------------------

def nonempty(text):
    """An argparse type: text with at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty; give at least one character")
    return text


def parse_args():
    """The flags; skip them at first."""
    parser = make_parser(__doc__)
    add = add_model_flags(parser, "bfloat16", quantize="auto")
    add("--threads", type=between(int, 1, 4096), metavar="N",
        help="on a CPU, how many cores to use (default: all)")
    add("--context", type=COUNT, metavar="N",
        help="longest text, prompt and answers, to reserve memory for (default: the "
             "model's longest that fits)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--sparsity", type=SHARE, default=0.0, metavar="S",
        help="share of the blocks' weights that decoding skips, 0 to 0.95 "
             "(default: %(default)s)")
    add("--calibration", metavar="FILE",
        help="thresholds from calibrate.py (default: those of this model, made if need be)")
    add = parser.add_argument_group("text").add_argument
    add("--prompt", metavar="TEXT", help="text to answer; - reads it from standard input")
    add("--chat", action="store_true",
        help="hold a conversation: answer every line of standard input; /help lists commands")
    add("--system", type=nonempty, metavar="TEXT", help="the system prompt: how to behave")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="whether a model such as Qwen3 thinks before it answers (default: the chat "
             "template's choice)")
    add("--raw", action="store_true",
        help="continue the prompt as it is, without the model's chat template")
    add("--max-new-tokens", type=COUNT, default=256, metavar="N",
        help="for each answer (default: %(default)s)")
    add("--stop", type=nonempty, action="append", default=[], metavar="TEXT",
        help="end the answer before this text; may be given several times")
    add = parser.add_argument_group(
        "sampling (the defaults named here give way to those of the model's "
        "generation_config.json)").add_argument
    add("--temperature", type=between(float, 0, 100), metavar="T",
        help="higher is more random, 0 takes the likeliest token (default: 0.7)")
    add("--top-k", type=between(int, 0, 2**31 - 1), metavar="K",
        help="choose among the K likeliest tokens, 0 for all (default: 50)")
    add("--top-p", type=between(float, 0, 1), metavar="P",
        help="choose among the likeliest tokens that together have probability P (default: 0.95)")
    add("--min-p", type=between(float, 0, 1), metavar="P",
        help="leave out tokens less likely than P times the likeliest (default: 0)")
    add("--repetition-penalty", type=between(float, 0.01, 100), metavar="R",
        help="above 1, make tokens of the text so far less likely (default: 1.0)")
    add("--seed", type=between(int, 0, 2**63 - 1), metavar="N",
        help="same seed, same text (default: a new one, which the summary names)")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="write the summary as one line of JSON")
    args = parser.parse_args()
    check(args, parser.error)
    if args.seed is None:
        args.seed = secrets.randbits(32)
    return args


def check(args, error):
    """Call `error` with a sentence for flags that do not go together."""
    if args.chat and args.raw:
        error("--chat needs the chat template that --raw leaves out; give one of them")
    for flag in ("system", "thinking"):
        if getattr(args, flag) is not None and args.raw:
            error(f"--{flag} needs the chat template that --raw leaves out; give one")
    if args.calibration and not (args.sparsity or args.chat):
        error("--calibration needs --sparsity S; without it, every weight is read")
    if args.prompt is None and not args.chat:
        error("there is nothing to do; give --prompt TEXT, --prompt - to read standard "
              "input, or --chat")
    if sys.stdin is None and (args.chat or args.prompt == "-"):
        error("standard input is closed; give --prompt TEXT")


def choose_sampling(args, tokenizer):
    """Sampling options: from the flags, else from the model's recommendation, else the defaults."""
    sampling = {"seed": args.seed}
    for name, default in SAMPLING.items():
        given = getattr(args, name)
        sampling[name] = tokenizer.sampling.get(name, default) if given is None else given
    return sampling


def fitting_context(model):
    """Tokens of a KV cache in half of the free memory; at least 512, even if those do not fit."""
    fits = free_memory(model.device) / 2 / cache_bytes(model.config, model.dtype)
    return int(min(model.config.context, max(fits, 512)))


def encode_prompt(args, tokenizer, prompt):
    """The prompt's ids, and those that `write` continues: none if a chat model answers them."""
    if not args.system and (args.raw or not tokenizer.has_chat_template):
        ids = tokenizer.encode(prompt)
        return ids, ids
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = system + [{"role": "user", "content": prompt}]
    return tokenizer.chat(messages, thinking=args.thinking), ()


def main():
    """Load the model, generate text, and summarize the run on standard error."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.prompt == "-":
        args.prompt = read_input(sys.stdin.read) if rank() == 0 else None
    model, tokenizer = load_model(args, context=args.context)
    # under torchrun (several GPUs), every process takes the first one's
    prompt, args.seed = from_first((args.prompt, args.seed))
    if args.thinking is not None and not tokenizer.can_think:
        raise ValueError("this model's chat template has no switch for --thinking")
    sampling = choose_sampling(args, tokenizer)
    seed = args.seed if sampling["temperature"] > 0 else None
    ids, continued = ([], ()) if args.chat else encode_prompt(args, tokenizer, prompt)
    context = model.config.context
    if not args.chat:
        context = min(context, len(ids) + args.max_new_tokens)
    elif args.context is None:
        context = fitting_context(model)

    def thresholds(sparsity):
        return find_thresholds(model, tokenizer, sparsity, args.calibration, args.model)

    session = open_session(model, thresholds(args.sparsity), context=context,
                           stop=tokenizer.eos_ids, **sampling)

    def respond(ids, sparsity):
        before = session.measured()
        new = session.generate(ids, args.max_new_tokens)
        text, ended = write(new, tokenizer, args.stop, continued)
        # the reason: Ctrl-C, else the session's own, else a stop text
        session.ended = ended if ended == "interrupted" else session.ended or ended
        explain_end(session, args.max_new_tokens)
        warn_of_sparsity(session, session.measured() - before, sparsity)
        return text

    def describe(stats, sparsity):
        numbers = report(session, stats, sparsity, seed)
        return json.dumps(numbers) if args.json else summary(numbers)

    if args.chat:
        chat = Chat(session, tokenizer, respond, thresholds, describe, sparsity=args.sparsity,
                    system=args.system, answer_room=args.max_new_tokens,
                    thinking=args.thinking)
        if sys.stdin.isatty():
            edit_lines()
            say(f"{args.model or 'SmolLM2-135M-Instruct'}, {args.quantize or args.dtype}, "
                f"{model.device}, sparsity {args.sparsity:g}, context {context} tokens\n"
                "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        chat.run(prompt)
        used = chat.used
    else:
        respond(ids, args.sparsity)
        used = {args.sparsity: session.measured()}
    for sparsity, stats in used.items():
        say(describe(stats, sparsity))


if __name__ == "__main__":
    run_script(main)
