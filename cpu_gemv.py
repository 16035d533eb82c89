"""The engine's products on a CPU: y = W x for one token, reading only the rows of W that matter.

PyTorch's `embedding_bag` adds up chosen rows of a table, each times a number. That is a sparse
product, and it reads nothing but those rows. A `CpuGemv` is made once for a matrix and its
thresholds, so that a token costs little besides the rows: NumPy compares x with the thresholds
and lists the kept rows, and one call sums them up. `sparse_gemv.py` explains the method and
holds a version that needs no preparing.

int8 weights take another table. PyTorch's quantized `embedding_bag` sums up rows of bytes, each
followed by a scale and an offset of its own. `pack` writes int8 weights that way, with scale 1
and offset -128, so that byte b counts as b - 128. This file needs torch and numpy alone.
"""

import functools
import itertools
import math
import warnings

import numpy as np
import torch

ROW_END = 8  # bytes after each row of a packed table: its scale and its offset, two float32


class CpuGemv:
    """A product prepared for one matrix: x [1, K] -> (x without its small entries) @ w_t, [1, N].

    w_t:        [K, N] contiguous floats, or packed int8, uint8 [n_blocks, K, width + ROW_END]
    ends:       the last column + 1 of each of the matrices that lie side by side in w_t
    thresholds: one float for each of them; x[k] is dropped where |x[k]| <= threshold
    scale:      float32 [N], multiplies the sums, or None
    bias:       [N], added next, or None
    dtype:      in which x is compared where w_t is packed; else it is that of w_t

    Each row of w_t is cut into n_blocks equal blocks. The same memory is then a table [K *
    n_blocks, N / n_blocks], and one bag sums up one block of columns. So every matrix can have
    its own kept rows, and the bags run on several threads. Bag i of the last call read the rows
    starts[i] ... starts[i + 1] - 1 of its list (NumPy int64); `first_bags` are those with which
    a matrix begins.
    """

    def __init__(self, w_t, ends, thresholds, scale=None, bias=None, dtype=torch.float32):
        self.packed = w_t.dtype == torch.uint8
        self.n, self.scale, self.bias = ends[-1], scale, bias
        self.dtype = dtype if self.packed else w_t.dtype
        k = w_t.shape[1] if self.packed else w_t.shape[0]
        width = self.n // w_t.shape[0] if self.packed else block_width(ends, thresholds)
        n_blocks = self.n // width
        self.table = w_t.view(k * n_blocks, -1)
        self.sparse = any(t >= 0 for t in thresholds)  # else keep everything
        self.order, self.rows = bags(k, n_blocks, self.packed, self.sparse)
        self.bounds = np.arange(0, k * n_blocks + 1, k)
        self.starts = self.bounds.copy()
        self.offsets = torch.from_numpy(self.starts)  # the same memory
        self.first_bags = [start // width for start in (0, *ends[:-1])]
        limits = [next(t for end, t in zip(ends, thresholds) if block * width < end)
                  for block in range(n_blocks)]
        self.limits = largest_bits(torch.tensor(limits), self.dtype).repeat(k)
        self.mask = np.iinfo(self.limits.dtype).max  # all bits but the sign
        # Where every row is read: x, once for each bag.
        self.values = torch.empty(n_blocks, k, dtype=torch.float32 if self.packed else self.dtype)

    def __call__(self, x):
        if self.sparse:
            rows, values = self.find_rows(x)
        else:
            rows, values = self.rows, self.values.copy_(x).view(-1)
        if self.packed:
            y = byte_bags()(self.table, rows, self.offsets, per_sample_weights=values,
                            include_last_offset=True)
        else:
            y = torch.embedding_bag(self.table, rows, self.offsets, False, 0, False, values,
                                    True)[0]
        y = y.view(1, self.n)
        if self.scale is not None:
            y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def find_rows(self, x):
        """Of the kept entries of x: their rows in the table, bag after bag, and their values."""
        x = x.to(self.dtype)  # that of the limits
        bits = x.view(BITS[x.element_size()]).numpy()[0].take(self.order)  # each bag's copy
        # Floats without a sign are in the order of their bits, and NaN is the largest: kept.
        kept = ((bits & self.mask) > self.limits).nonzero()[0]
        self.starts[:] = kept.searchsorted(self.bounds)
        values = torch.from_numpy(bits.take(kept)).view(x.dtype)
        return torch.from_numpy(self.rows.numpy().take(kept)), values.to(self.values.dtype)


BITS = {2: torch.int16, 4: torch.int32}  # an integer dtype for the bits of floats of a size


def largest_bits(thresholds, dtype):
    """float32 thresholds [n] -> the bits of the largest numbers of `dtype` not above them, NumPy
    [n]; -1 for a negative threshold."""
    rounded = thresholds.abs().to(dtype)
    above = (rounded.float() > thresholds.abs()).to(BITS[dtype.itemsize])
    return torch.where(thresholds >= 0, rounded.view(above.dtype) - above, -1).numpy()


class RowCount:
    """How many rows the last calls of some CpuGemvs read, int64, one number for each matrix."""

    def __init__(self, products):
        self.starts = [product.starts for product in products]
        before = itertools.accumulate(map(len, self.starts), initial=0)
        self.first = np.array([place + bag for place, product in zip(before, products)
                               for bag in product.first_bags])

    def __call__(self):
        starts = np.concatenate(self.starts)
        return torch.from_numpy(starts[self.first + 1] - starts[self.first])


def block_width(ends, thresholds):
    """The width of a block of columns.

    A block lies within one matrix, unless all have one threshold. Every thread gets as many
    blocks as any other. And a block is narrow enough for a thread's sums to stay in its L1 cache.
    """
    n = ends[-1]
    whole = n if len(set(thresholds)) == 1 else math.gcd(*ends)
    pieces = math.ceil(torch.get_num_threads() * whole / n)
    return whole // math.gcd(whole, pieces * math.ceil(whole / pieces / 8192))


@functools.lru_cache(maxsize=None)
def bags(k, n_blocks, packed, shuffled):
    """Bag after bag, the entries of x that it takes, NumPy [n_blocks * K]; and each entry's row in
    the table, int64.

    Where some rows are skipped, the order is shuffled. The processor fetches ahead what it takes
    for a pattern; of half the rows in order, it would fetch many that are dropped.
    """
    order = torch.arange(k)
    if shuffled:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    blocks = torch.arange(n_blocks)[:, None]
    # Packed weights lie block after block; others row after row, so that the blocks alternate.
    rows = blocks * k + order if packed else order * n_blocks + blocks
    return order.repeat(n_blocks).numpy(), rows.view(-1)


@functools.lru_cache(maxsize=None)
def byte_bags():
    """PyTorch's operator that sums up packed rows; a plain one, with a warning, where it is gone.
    """
    try:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    except AttributeError:
        warnings.warn("this PyTorch has no embedding_bag for bytes, so int8 is slow on the CPU; "
                      "leave out --quantize, or install PyTorch 2.13", stacklevel=2)
        return plain_byte_bags


def plain_byte_bags(table, rows, starts, per_sample_weights, include_last_offset):
    """The same sums, float32 [number of bags, width], by a product for each bag."""
    cuts = starts[1:-1]
    bags = zip(rows.tensor_split(cuts), per_sample_weights.tensor_split(cuts))
    return torch.stack([values @ (table[k, :-ROW_END].float() - 128) for k, values in bags])


# ---- packed int8 -------------------------------------------------------------------------------

def empty_packed(k, ends, narrow=False):
    """Room for int8 [k, ends[-1]], matrices side by side that end at `ends`; no two share a block.

    There is a block for every thread, as wide as that allows: scattered rows are read fastest
    when they are long. If `narrow`, blocks have 256 columns or hardly more, which is faster where
    all rows are read.
    """
    whole = math.gcd(*ends)
    least = max(1, min(whole, 256 if narrow else ends[-1] // torch.get_num_threads()))
    width = next(width for width in range(least, whole + 1) if whole % width == 0)
    packed = torch.empty(ends[-1] // width, k, width + ROW_END, dtype=torch.uint8)
    packed[:, :, width:] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return packed


def pack(packed, start, q):
    """Write int8 q [n, K] as the columns from `start` on."""
    width = packed.shape[2] - ROW_END
    blocks = packed[start // width:(start + len(q)) // width, :, :width]
    blocks.copy_(q.view(torch.uint8).view(-1, width, q.shape[1]).transpose(1, 2))
    blocks ^= 128  # flips the sign bit: two's complement q becomes the byte q + 128


def unpack(packed, start, end):
    """Columns start ... end - 1, multiples of a block's width, as int8 [K, end - start]."""
    width = packed.shape[2] - ROW_END
    blocks = packed[start // width:end // width, :, :width] ^ 128  # [blocks, K, width]
    return blocks.view(torch.int8).transpose(0, 1).flatten(1)
