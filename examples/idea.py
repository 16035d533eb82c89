"""TEAL from nothing: drop the small inputs of every product, and watch the perplexity.

    python -m examples.idea             # reads README.md: perplexity 53 at 0%, 77 at 50%
    python -m examples.idea wiki.test.raw
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load

model, tokenizer = load()  # the default model, SmolLM2-135M-Instruct
text = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md").read_text(encoding="utf-8")
first, second = torch.tensor(tokenizer.encode(text)[:1024]).chunk(2)

# Every product y = W x in the model's blocks is a call project(x, linear). (The LM head stays
# dense.) On the first half of the text, look at the inputs x.
magnitudes = {}


def look(x, linear):
    # q, k and v are one linear, as are gate and up
    magnitudes[linear] = x.abs().flatten().sort().values
    return linear(x)


model.forward(first, project=look)


# The threshold that drops a share s of the inputs is the s-quantile of |x|.
def perplexity(sparsity):
    """Perplexity of the second half when every product drops this share of its inputs."""
    def masked(x, linear):
        sorted_x = magnitudes[linear]
        threshold = sorted_x[int(sparsity * len(sorted_x))]
        # The engine also drops an |x| equal to its threshold. With < here, a share of 0 drops none.
        return linear(torch.where(x.abs() < threshold, 0, x))  # a zero needs no column of W

    logits = model.logits(model.forward(second, project=masked))
    return F.cross_entropy(logits[:-1].float(), second[1:]).exp().item()


print("sparsity asked for    perplexity")
for sparsity in (0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8):
    print(f"{sparsity:18.0%}    {perplexity(sparsity):10.1f}")
