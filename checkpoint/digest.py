"""Which weights a model has, in 16 hex digits: a hash of a sample of every tensor.

Models of one shape may be a release and its fine-tune, or one release rounded in two ways.
Thresholds and measurements belong to one of them. To hash all weights would take longer than to
load them, so a tensor gives a few thousand numbers, evenly spaced over it: any training, merging
or rounding changes some of those. They are taken from the checkpoint as bfloat16, so the digest
does not depend on the dtype, on the device, or on int8 made while loading.
"""

import hashlib
import math

import torch

SAMPLE = 4096  # about so many numbers of a tensor, or all


class Digest:
    """Takes one named tensor after the other. Of several `ranks`, each adds its slices."""

    def __init__(self, ranks=None):
        self.ranks, self.samples = ranks, []  # (text, numbers) of every tensor

    def add(self, name, tensor):
        """A whole tensor, of any shape, dtype and device."""
        step = tensor.numel() // SAMPLE | 1  # odd, so that it does not stay in a few columns
        self.append(name, tensor.shape, tensor.detach().reshape(-1)[::step])

    def add_slice(self, name, tensor, shape, part):
        """A rank's slices `part` of a tensor of this shape; other ranks' numbers are 0."""
        place = torch.arange(0, math.prod(shape), math.prod(shape) // SAMPLE | 1)  # as in `add`
        at = torch.stack(torch.unravel_index(place, shape), dim=1)  # [sample, dimensions]
        at -= torch.tensor([taken.start or 0 for taken in part])
        mine = ((at >= 0) & (at < torch.tensor(tensor.shape))).all(dim=1)
        if tensor.shape == shape and self.ranks.rank > 0:
            mine[:] = False  # a tensor that all ranks hold is the first one's to add
        sample = torch.zeros(len(place), dtype=tensor.dtype)
        sample[mine] = tensor[at[mine].unbind(1)]
        self.append(name, shape, sample)

    def append(self, name, shape, sample):
        bits = sample.to("cpu", torch.bfloat16).view(torch.int16)
        self.samples.append((f"{name} {tuple(shape)} ", bits.int()))  # a copy, not the tensor

    def hexdigest(self):
        """The digest; every rank must ask for it."""
        texts, samples = zip(*self.samples)
        bits = torch.cat(samples)
        if self.ranks is not None:  # once for all: the ranks wait for each other
            bits = self.ranks.total(bits)
        digest = hashlib.sha256()
        for text, part in zip(texts, bits.to(torch.int16).split([*map(len, samples)])):
            digest.update(text.encode() + part.numpy().tobytes())
        return digest.hexdigest()[:16]


def weights_digest(model):
    """16 hex digits: those of the checkpoint that a Model was loaded from; a Model made in any
    other way is known by the last norm and the blocks' matrices that it holds now."""
    if hasattr(model, "digest"):
        return model.digest
    digest = Digest()
    for i, tensor in enumerate([model.norm, *(linear.w_t for linear in model.linears())]):
        digest.add(str(i), tensor)
    return digest.hexdigest()
