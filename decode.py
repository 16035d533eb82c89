"""Decoding: the prompt at once, then token after token.

`prefill` and `decode_one_token` define the result. A decoder repeats the second for n tokens,
faster: on a CPU in one C file (cpu/step.c), on a GPU in Triton kernels (gpu/decoder.py). Both skip
the weights that belong to small inputs. `session.py` builds a text from such steps.
"""

import functools
import sys

import torch

from cpu.compiler import NoCompiler
from cpu.step import CStep
from model import PROJECTIONS, masked


@torch.inference_mode()
def prefill(model, cache, chunks):
    """Add a prompt to a KV cache -> the logits of the next token, [V].

    chunks: the prompt in pieces, an iterable of ids int64 [T]

    Every weight is read once for a chunk's T tokens, so the time goes into arithmetic, not memory,
    and prefill stays dense.
    """
    for tokens in chunks:
        hidden = model.forward(tokens, cache)  # [T, hidden_size]
    return model.logits(hidden[-1:])[0]


@torch.inference_mode()
def decode_one_token(model, cache, token, thresholds, kept):
    """Add one token, an id int64 [1], to a KV cache -> the logits of the next one, [V].

    thresholds: float32 [n_layers, 7]: inputs up to these are dropped; -1 keeps all
    kept:       int64 [n_layers, 7], to which the numbers of inputs that were kept are added
    """
    def project(x, linear):
        at = linear.layer, linear.places
        kept[at] += (~(x.float().abs() <= thresholds[at][:, None])).sum(1)
        return masked(x, linear, thresholds[at])

    hidden = model.forward(token, cache, project)  # [1, hidden_size]
    return model.logits(hidden)[0]


def new_decoder(model, cache, choose, generators=(), **head):
    """The decoder for a model's device; `GpuDecoder` explains the arguments."""
    if model.device.type == "cpu":
        return CpuDecoder(model, cache, choose, **head)
    from gpu.decoder import GpuDecoder  # Triton is not everywhere

    return GpuDecoder(model, cache, choose, generators, **head)


class CpuDecoder:
    """Decodes tokens of a model on a CPU over a KV cache: in C, or slowly in PyTorch.

    choose: a function of logits [V] that returns a token id, int64 [1]
    head:   top, seen, penalty: `choose` needs only the `top` largest logits (after the penalty of
            those seen); the default is all

    `kept`, int64 [n_layers, 7], counts the rows read by the `n_steps` steps so far. `bounds` is the
    LM head's Certificate (lm_head.py: an int8 copy that rules out most rows), or None.
    """

    def __init__(self, model, cache, choose, **head):
        self.model, self.cache, self.choose, self.bounds = model, cache, choose, None
        self.thresholds = torch.full((model.config.n_layers, len(PROJECTIONS)), -1.0)
        self.kept, self.step_rows = torch.zeros(2, *self.thresholds.shape, dtype=torch.int64)
        self.n_steps = self.head_rows_read = 0
        self.read_token = self.read_token_without_c
        if model.ranks is not None:  # several processes are for GPUs; on a CPU, for tests
            return
        try:
            self.read_token = CStep(model, cache, self.thresholds, self.step_rows, **head)
            self.bounds = self.read_token.bounds
        except NoCompiler as error:
            warn_once(f"decoding on this CPU is slow: {error}")

    def set_thresholds(self, thresholds):
        """Decode with thresholds float32 [n_layers, 7] from now on; -1 keeps everything."""
        self.thresholds.copy_(thresholds)  # in place: CStep reads this tensor

    def start(self, token, position):
        """Make `token`, an id, the input of the next step, at `position` in the text."""
        self.token, self.position = torch.tensor([token]), position

    @torch.inference_mode()
    def step(self):
        """Read `token`, at `position`, and put the next one in its place."""
        self.step_rows.zero_()  # added below, once the step is done, as Ctrl-C may cut it short
        # After infinite or NaN logits, the token is -1. Session stops there, benchmark.py goes on.
        self.token = self.choose(self.read_token(max(0, self.token.item()), self.position))
        self.position += 1
        self.kept += self.step_rows
        if self.bounds is not None:
            self.head_rows_read += self.read_token.head_rows.sum().item()
        self.n_steps += 1

    def read_token_without_c(self, token, position):
        length, self.cache.length = self.cache.length, position
        logits = decode_one_token(
            self.model, self.cache, torch.tensor([token]), self.thresholds, self.step_rows)
        self.cache.length = length  # `Session.generate` counts the tokens, whichever decoder runs
        return logits

    def head_rows(self):
        """Rows of the LM head read so far. Its int8 copy is not counted."""
        every_row = self.n_steps * self.model.config.vocab_size
        return every_row if self.bounds is None else self.head_rows_read

    def tokens(self, n_steps):
        """Yield the ids that n_steps steps choose."""
        for _ in range(n_steps):
            self.step()
            yield self.token.item()


@functools.cache
def warn_once(sentence):
    print(f"warning: {sentence}", file=sys.stderr)
