"""A sparse Linear for any PyTorch model: `SparseLinear` in place of `nn.Linear`.

TEAL needs no model of its own: where a model multiplies one token's x with a weight matrix, the
kernels of `sparse_gemv.py` can read only the rows that x's large entries need. `replace_linears`
puts them in; `calibrate.calibrate_module` finds the thresholds; `examples/transformers_model.py`
shows both.

Method: Liu et al., "TEAL" (arXiv:2408.14690), section 4. Copy this file and `sparse_gemv.py`.
"""

import torch
import torch.nn.functional as F

from sparse_gemv import sparse_gemv


# An operator of its own, so that torch.compile need not look inside.
@torch.library.custom_op("nanoteal::sparse_linear", mutates_args=())
def _sparse_linear(x: torch.Tensor, w_t: torch.Tensor, threshold: torch.Tensor,
                   bias: torch.Tensor | None) -> torch.Tensor:
    return sparse_gemv(x, w_t, threshold, bias=bias)


@_sparse_linear.register_fake
def _(x, w_t, threshold, bias):
    return x.new_empty(*x.shape[:-1], w_t.shape[1])


class SparseLinear(torch.nn.Module):
    """An `nn.Linear` for inference that reads only the rows of W that one token needs.

    x [..., in_features] -> [..., out_features]. One token, x.numel() == in_features, drops the
    x[k] with |x[k]| <= threshold; more tokens, as in a prompt, are a dense product. `w_t`
    [in_features, out_features] is the weight, stored once, and `bias` [out_features] or None.
    `threshold`, float32 [1], is a buffer: fill_ it at any time, under a captured CUDA graph too.
    In a state dict, the weight has an `nn.Linear`'s name and shape: `save_pretrained` writes what
    `from_pretrained` reads, dense, into the model without this class.
    Works under torch.compile(fullgraph=True). float32, float16 and bfloat16; no gradients.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

        def parameter(*shape):
            empty = torch.empty(*shape, device=device, dtype=dtype)
            return torch.nn.Parameter(empty, requires_grad=False)

        self.w_t = parameter(in_features, out_features)
        self.bias = parameter(out_features) if bias else None
        self.register_buffer("threshold", torch.full((1,), -1.0, device=device,
                                                     dtype=torch.float32))
        self._make_workspace()

    @classmethod
    def from_linear(cls, linear, threshold=-1.0):
        """A copy of an `nn.Linear`, transposed. Raises ValueError for weights that are quantized,
        on the meta device or of another shape than the layer says, and for a threshold of NaN."""
        weight, shape = linear.weight, (linear.out_features, linear.in_features)
        floats = torch.float32, torch.float16, torch.bfloat16
        if (weight.is_meta or type(weight.data) is not torch.Tensor or weight.dtype not in floats
                or weight.shape != shape or 0 in shape):
            raise ValueError(
                f"SparseLinear: the weight is a {type(weight.data).__name__} of {weight.dtype} "
                f"{tuple(weight.shape)} on {weight.device}; load a model that is not quantized: "
                f"float32, float16 or bfloat16 {shape}")
        if threshold != threshold:
            raise ValueError("SparseLinear: the threshold is NaN; give a number")
        with torch.no_grad():
            new = cls(shape[1], shape[0], linear.bias is not None, weight.device, weight.dtype)
            new.w_t.copy_(weight.T)
            if linear.bias is not None:
                new.bias.copy_(linear.bias)
            new.threshold.fill_(threshold)
        return new

    def forward(self, x):
        if x.numel() == self.in_features == x.shape[-1]:
            return _sparse_linear(x.contiguous(), self.w_t, self.threshold, self.bias)
        return F.linear(x, self.w_t.T, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination.pop(prefix + "w_t").T

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "weight" in state_dict:
            state_dict[prefix + "w_t"] = state_dict.pop(prefix + "weight").T
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn, recurse=True):
        """`to`, `half`, `cuda` and their like."""
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:  # rounded: bfloat16 makes 0.3008 of 0.3
            self.threshold = threshold.to(self.threshold.device)
        self._make_workspace()
        return self

    @torch.no_grad()
    def _make_workspace(self):
        """Run once on a GPU: under a CUDA graph, also one that torch.compile makes, the kernels
        must not allocate."""
        if self.w_t.is_cuda:
            self(self.w_t.new_zeros(self.in_features))

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def replace_linears(module, thresholds):
    """Put a SparseLinear in place of every `nn.Linear` that `thresholds`, {name: number},
    names. For one that is a SparseLinear already, only the threshold changes.

    Names are those of `module.named_modules()`. Raises ValueError, before anything changes, for a
    name that is not a Linear of this module.
    """
    found = dict(module.named_modules())
    for name in thresholds:
        if not isinstance(found.get(name), (torch.nn.Linear, SparseLinear)):
            raise ValueError(f"replace_linears: {name!r} is not a Linear of this module: the "
                             "thresholds are another model's; make them with this one")
    for name, threshold in thresholds.items():
        if isinstance(found[name], SparseLinear):
            found[name].threshold.fill_(threshold)
        else:
            module.set_submodule(name, SparseLinear.from_linear(found.pop(name), threshold))
