"""What a run prints: the text, its numbers, warnings, and why an answer ended early."""

import sys

from checkpoint.tokenizer import text_pieces
from cli.accounting import block_bytes
from tensor_parallel import mean, world_size


def write(ids, tokenizer, stop=(), prompt=()):
    """Print token ids as text while they come, until they end or Ctrl-C; prompt: see `TextStream`.

    Returns the text, and what ended it if not the ids: "interrupted" or "stop text".
    """
    text, ended = "", "stop text"
    try:
        for piece in text_pieces(ids, tokenizer, stop, prompt):
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        ended = "interrupted"
    except ValueError:
        if text:
            print(flush=True)  # the error message begins on a new line
        raise
    print(flush=True)
    return text, ended


def say(text):
    """Print what the program, not the model, has to say."""
    print(text, file=sys.stderr, flush=True)


def report(session, stats, sparsity, seed):
    """The numbers of a run, by name, for `summary` and --json. Bytes are those of all ranks."""
    def of_all(n_bytes):
        return mean(n_bytes) * world_size()

    numbers = {"prompt_tokens": stats.prompt_tokens, "new_tokens": stats.new_tokens,
               "prompt_tokens_per_second": None, "tokens_per_second": None, "sparsity": sparsity,
               "realised_sparsity": None, "bytes_per_token": None,
               "block_bytes": of_all(block_bytes(session.model)), "ranks": world_size(),
               "seed": seed, "ended": session.ended}
    if stats.prompt_tokens:
        numbers["prompt_tokens_per_second"] = stats.prompt_tokens / stats.prefill_seconds
    if stats.steps:
        numbers |= {"tokens_per_second": stats.steps / stats.decode_seconds,
                    "realised_sparsity": mean(session.sparsity(stats)),
                    "bytes_per_token": of_all(session.bytes_per_token(stats)),
                    "head_rows_per_token": stats.head_rows / stats.decoder_steps}
    return numbers


def summary(numbers):
    """The numbers of `report` in one line, which ends with what sparsity saved."""
    def speed(name):
        return f", {numbers[name]:.1f} tok/s" if numbers[name] else ""

    parts = [f"prompt {numbers['prompt_tokens']} tokens{speed('prompt_tokens_per_second')}",
             f"new {numbers['new_tokens']} tokens{speed('tokens_per_second')}"]
    if numbers["seed"] is not None:
        parts.append(f"seed {numbers['seed']}")
    if numbers["bytes_per_token"]:
        ranks = f" by {numbers['ranks']} ranks" if numbers["ranks"] > 1 else ""
        parts.append(f"{numbers['bytes_per_token'] / 1e6:.1f} MB read per token{ranks}")
        if numbers["sparsity"]:
            parts.append(f"{numbers['realised_sparsity']:.1%} of the blocks' "
                         f"{numbers['block_bytes'] / 1e6:.1f} MB unread "
                         f"({numbers['sparsity']:.0%} asked)")
    return " | ".join(parts)


def explain_end(session, max_new_tokens):
    """Say why an answer is not complete, if it is not."""
    if session.ended == "length":
        say(f"(cut at {max_new_tokens} tokens; --max-new-tokens N allows more)")
    elif session.ended == "context":
        say(f"(cut: the context of {session.cache.context} tokens is full)")


def warn_of_sparsity(session, stats, asked):
    """Warn if an answer reached another sparsity: its thresholds are of other weights or texts."""
    if asked and stats.decoder_steps >= 64:
        reached = mean(session.sparsity(stats))
        if abs(reached - asked) > 0.05:
            say(f"warning: sparsity {asked:g} was requested, but this answer reached {reached:.3f};"
                " the calibration does not fit these weights or this text")
