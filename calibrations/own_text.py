"""Text that a model writes itself, to calibrate on where there is no other."""

import itertools

import torch

from cli.progress import progress
from session import Session

PROMPTS = (
    "Tell me about the history of a city.", "Explain how an engine works.",
    "Write a short story.", "Write a Python function that sorts a list.",
    "What have scientists found out about the sea?", "Write a C program that computes a mean.",
    "Describe the life of a famous musician.", "Write a Java class for a bank account.",
    "How do I cook a good soup?", "What should I know about money?")


def write_text(model, tokenizer, n_tokens, seed=0):
    """Token ids int64 [n_tokens] of text that the model writes itself, dense, at temperature 1.

    A chat model answers PROMPTS in turn. Any other model continues its first token. Every text
    goes on to its end or to 512 tokens.
    """
    bos_id, eos_ids = tokenizer.bos_id, tokenizer.eos_ids
    starts = [[min(eos_ids, default=0) if bos_id is None else bos_id]]
    if tokenizer.has_chat_template:
        starts = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    context, text = min(512, model.config.context), []
    session = Session(model, temperature=1.0, seed=seed, stop=eos_ids, context=context)
    with progress("writing text", n_tokens) as bar:
        for start in itertools.cycle(starts):
            for token in itertools.chain(start, session.generate(start[:context], context)):
                text.append(token)
                bar.update(1)
                if len(text) == n_tokens:
                    return torch.tensor(text)
