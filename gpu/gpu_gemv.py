"""Which kernel computes a product y = W x of a decode step on a GPU, as whole models timed it.

| weights | all rows | some rows |
|---|---|---|
| bfloat16 | `tensor_gemv`; matrices of a side of 2,048 and less: `dense_gemv` | `sparse_gemv` (*) |
| float32, float16 | `dense_gemv` | `sparse_gemv` (*) |
| int8 | `sparse_gemv`: dense_gemv saves bytes there, but no instructions | `sparse_gemv` |
| 4 bits | `tensor_gemv` | `tensor_gemv` |

(*) Where a program has few rows, `dense_gemv`, which saves a launch.
"""

import torch

from gpu.dense_gemv import dense_gemv, is_small, one_kernel_pays
from gpu.tensor_gemv import tensor_gemv
from sparse_gemv import sparse_gemv


def gpu_gemv(x, w_t, thresholds, out, *, scale=None, **options):
    """y = W x into `out`, with the arguments of `sparse_gemv`; `thresholds` None reads all rows."""
    if w_t.dtype == torch.uint8:
        tensor_gemv(x, w_t, thresholds, out, scale=scale, **options)
    elif thresholds is not None and one_kernel_pays(x, w_t, options.get("ends")):
        dense_gemv(x, w_t, out, thresholds=thresholds, **options)
    elif w_t.dtype == torch.int8 or thresholds is not None:
        t = -1.0 if thresholds is None else thresholds
        sparse_gemv(x, w_t, t, scale=scale, out=out, **options)
    elif x.dtype == torch.bfloat16 and not is_small(*w_t.shape):
        tensor_gemv(x, w_t, None, out, **options)
    else:
        dense_gemv(x, w_t, out, **options)
