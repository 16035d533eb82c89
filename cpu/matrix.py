"""The matrices of a model as step.c sees them, and the product of few-bit weights with a prompt.

C reads the weights where PyTorch keeps them; nothing is copied but biases, which become float32.
"""

import ctypes
import functools
from ctypes import POINTER, c_float, c_int32, c_void_p

import torch

from cpu.compiler import NoCompiler, library
from model import cpu_dtype

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
PIECE = 1 << 20  # weights unpacked at a time; they stay in the cache
BLOCK = 384  # columns: a multiple of every type's block
MOST_THREADS = 64


class CPacked(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("words", "scale", "minimum")),
                *((name, c_int32) for name in ("bits", "group", "offset", "n_words", "columns")),
                ("unit", c_float)]


class Matrix(ctypes.Structure):
    _fields_ = [("packed", POINTER(CPacked)),
                *((name, c_void_p) for name in (
                    "w", "groups", "scale", "bias", "thresholds", "kept")),
                ("dtype", c_int32), ("k", c_int32), ("n", c_int32),
                ("n_parts", c_int32), ("ends", c_int32 * 4)]


def address(tensor):
    """Of a contiguous tensor's first number; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def describe_packed(parts):
    """The structs of some `Packed`, as an array."""
    return (CPacked * len(parts))(*(CPacked(
        address(part.words), address(part.scale), address(part.minimum), part.bits, part.group,
        part.offset, part.words.shape[1], part.columns, part.unit) for part in parts))


def describe(matrix, linear, bias=None):
    """Fill in the struct of a `Linear`, but for thresholds; bias: the address of its floats."""
    matrix.k, matrix.n, matrix.bias = linear.in_features, linear.ends[-1], bias
    matrix.n_parts, matrix.ends[:len(linear.ends)] = len(linear.ends), linear.ends
    if hasattr(linear, "parts"):
        matrix.packed = describe_packed(linear.parts)
        return
    rows = linear.w_t.T if linear.layer is None else linear.w_t
    matrix.w, matrix.dtype = address(rows), DTYPES[rows.dtype]
    by_group = rows.dtype == torch.uint8
    setattr(matrix, "groups" if by_group else "scale", address(linear.scale))


def unpack(matrix, part, first, end, floats):
    """Columns first ... end - 1 of a projection as floats [K, end - first]. Raises NoCompiler.

    first:  where a block begins
    floats: float32 [K, whole blocks], which may hold them
    """
    n_threads = min(torch.get_num_threads(), MOST_THREADS, max(1, floats.numel() >> 16))
    library().unpack(ctypes.byref(matrix), part, first, end - first, floats.shape[1],
                     c_void_p(floats.data_ptr()), n_threads)
    return floats[:, :end - first]


def pieces(linear):
    """The few-bit weights of a Linear as floats [K, columns], some columns after others."""
    matrix, k = Matrix(), linear.in_features
    describe(matrix, linear)
    step = max(1, PIECE // k // BLOCK) * BLOCK
    # Memory that was used before saves time, but a backward pass needs all pieces.
    empty = torch.empty if torch.is_grad_enabled() else used
    for part, (width, start) in enumerate(zip(linear.widths, linear.starts)):
        for first in range(0, width, step):
            end = min(first + step, width)
            try:
                yield unpack(matrix, part, first, end, empty(k, step))
            except NoCompiler:
                yield linear.weight(start + first, start + end)


used = functools.lru_cache(2)(torch.empty)


def multiply_pieces(x, linear):
    """x [T, K] times few-bit weights -> [T, N], with only a piece of them in floats at a time."""
    dtype = cpu_dtype(x.dtype)
    wide = x.to(dtype)
    y = torch.cat([wide @ w.to(dtype) for w in pieces(linear)], dim=-1).to(x.dtype)
    return y if linear.bias is None else y + linear.bias
