"""The choice of the next token from its logits: greedy, or drawn from the likeliest.

Everything here has fixed shapes and never waits for the GPU, so that a CUDA graph can hold it.
On a CPU, this file needs only torch.
"""

import torch


def likeliest(logits):
    """Logits [V] -> the likeliest id, int64 [1]: of equals the first; -1 if not all are finite."""
    if logits.is_cuda:
        from gpu.token_kernels import likeliest_on_gpu  # Triton is not everywhere

        return likeliest_on_gpu(logits)
    finite = torch.stack(logits.aminmax()).isfinite().all()  # NaN if one of them is
    # NumPy's argmax takes a tenth of PyTorch's time.
    return torch.tensor([logits.float().numpy().argmax() if finite else -1])


def penalize(logits, seen, penalty):
    """Logits [V], made less likely where `seen`, bool [V], is true: positive ones are divided by
    the penalty, negative ones multiplied (CTRL, Keskar et al., arXiv:1909.05858, as in
    transformers)."""
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def largest(logits, k):
    """The k largest of float32 logits [V], the largest first, and their ids; of equals the first
    come first. torch.topk leaves open which of equals it takes, and in which order."""
    bits, last = logits.view(torch.int32), len(logits) - 1
    # As integers, floats keep their order if the bits of negative ones are inverted. The id follows
    # in the lower half.
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    keys.bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=logits.device))
    ids = last - (keys.topk(k).values & 0xFFFFFFFF)
    return logits[ids], ids


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Logits [V] -> a token id, int64 [1].

    temperature: divides the logits; 0 takes the likeliest token
    top_k:       only the k likeliest tokens; 0 for all
    top_p:       of those, only the likeliest that together reach this probability; 1 for all
    min_p:       of those, only the ones at least so likely as this share of the likeliest
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits.float(), None
    if top_k:
        logits, ids = largest(logits, min(top_k, len(logits)))
    elif top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    # Subtract the maximum so that a tiny temperature cannot overflow. Many tiny probabilities need
    # float64 to add up right.
    scores = (logits - logits.amax()).double() / temperature  # as a float32, 1e-46 would be 0
    probabilities = scores.softmax(-1, dtype=torch.float64)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens together
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    if min_p > 0:
        least = min_p * probabilities.amax()
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # argmax(p / Exp(1)) samples from p without waiting for the GPU.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / clocks).argmax(-1, keepdim=True)
    return choice if ids is None else ids.gather(-1, choice)
