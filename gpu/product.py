"""Which kernel computes a product y = W x of a decode step on a GPU, as whole models timed it.

| weights | all rows | some rows |
|---|---|---|
| bfloat16 | tensor cores; matrices of a side of 2,048 and less: one kernel | lists (*) |
| float32, float16 | one kernel | lists (*) |
| int8 | lists: one kernel saves bytes there, but no instructions | lists |
| 4 bits | tensor cores | tensor cores |

(*) Where a program has few rows, one kernel, which saves a launch.
"""

import torch

from gpu.four_bits import product_of_four_bits
from gpu.lists import product_by_lists
from gpu.one_kernel import is_small, one_kernel_pays, product_in_one_kernel
from gpu.tensor_cores import product_on_tensor_cores


def product(x, w_t, thresholds, out, *, scale=None, **options):
    """y = W x into `out`, with the arguments of `product_by_lists`; `thresholds` None reads all
    rows. 4-bit weights are uint8, see `product_of_four_bits`."""
    if w_t.dtype == torch.uint8:
        product_of_four_bits(x, w_t, thresholds, out, scale=scale, **options)
    elif thresholds is not None and one_kernel_pays(x, w_t, options.get("ends")):
        product_in_one_kernel(x, w_t, thresholds, out, **options)
    elif w_t.dtype == torch.int8 or thresholds is not None:
        product_by_lists(x, w_t, thresholds, out, scale=scale, **options)
    elif x.dtype == torch.bfloat16 and not is_small(*w_t.shape):
        product_on_tensor_cores(x, w_t, out, **options)
    else:
        product_in_one_kernel(x, w_t, None, out, **options)
