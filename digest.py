"""Which weights a model has, in 16 hex digits: a hash of a sample of every tensor.

Models of one shape may be a release and its fine-tune, or one release rounded in two ways.
Thresholds and measurements belong to one of them. To hash all weights would take longer than to
load them, so a tensor gives a few thousand numbers, evenly spaced over it: any training, merging
or rounding changes some of those. They are taken from the checkpoint as bfloat16, so the digest
does not depend on the dtype, on the device, or on int8 made while loading.
"""

import hashlib

import torch

SAMPLE = 4096  # about so many numbers of a tensor, or all


class Digest:
    """Takes one named tensor after the other."""

    def __init__(self):
        self.hash = hashlib.sha256()

    def add(self, name, tensor):
        """The tensor may have any shape, dtype and device."""
        step = tensor.numel() // SAMPLE | 1  # odd, so that it does not stay in a few columns
        numbers = tensor.detach().reshape(-1)[::step].to("cpu", torch.bfloat16)
        self.hash.update(f"{name} {tuple(tensor.shape)} ".encode())
        self.hash.update(numbers.view(torch.int16).numpy().tobytes())

    def hexdigest(self):
        return self.hash.hexdigest()[:16]


def weights_digest(model):
    """16 hex digits: those of the checkpoint that a Model was loaded from; a Model made in any
    other way is known by the tensors that it holds now."""
    if model.digest is not None:
        return model.digest
    digest = Digest()
    for block in model.blocks:
        digest.add("attn_norm", block.attn_norm)
        digest.add("mlp_norm", block.mlp_norm)
    for linear in [*model.linears(), model.lm_head]:
        for name in ("w_t", "scale", "bias"):
            if getattr(linear, name) is not None:
                digest.add(f"{linear.site}.{name}", getattr(linear, name))
    digest.add("norm", model.norm)
    if model.embedding is not None:
        digest.add("embedding", model.embedding)
    return digest.hexdigest()
