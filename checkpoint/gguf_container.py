"""The container of a GGUF file: its header, where its tensors lie, and the parts of a split one.

The header comes first: counts, metadata as typed key-value pairs, and each tensor's shape, type
and place. Then come the tensors. It is read here and not by the `gguf` package, for two reasons.
The package takes seconds over a vocabulary of 50,000 strings. And every count and length in a
stranger's file is a claim, to be compared with the file's size before it is believed. A large
model may be split into files NAME-00001-of-00003.gguf, ..., each with a header and tensors of its
own; only the first one's metadata apply.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from checkpoint.opened import blame, refuse_stand_in

HEADER_LIMIT = 32 << 20  # bytes; with 260,000 tokens it takes about 15 MB
COUNT_LIMIT = 1 << 16  # of metadata entries, and of tensors
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}  # type in the header -> dtype
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10


def read_parts(path):
    """A GGUF file, or any part of a split one (Path) -> (metadata, tensors).

    metadata: {key: value}; tensors: {GGUF name: (shape, type, offset in the file, file)}
    Raises ValueError. Where another part is to blame, the error names it.
    """
    metadata, tensors = read_file(path)
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return metadata, tensors
    name = re.fullmatch(r"(.+-)(\d{5})(-of-)(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if not name or int(name[4]) != count or not 1 <= int(name[2]) <= count:
        raise ValueError(f"it is one of {count!r} parts of a split GGUF, which need their names, "
                         "such as NAME-00001-of-00002.gguf, to be found")
    tensors = {}
    for i in range(1, count + 1):
        part = path.with_name(f"{name[1]}{i:05}{name[3]}{name[4]}{name[5]}")
        if not part.is_file():
            raise ValueError(f"it is part {int(name[2])} of {count} of a split GGUF, and "
                             f"{part.name} is missing; all parts must lie in one folder")
        with blame(part):
            own, found = read_file(part)
            if own.get("split.no") != i - 1 or own.get("split.count") != count:
                raise ValueError(f"it is not part {i} of {count} of a split GGUF, as its name says")
        metadata = own if i == 1 else metadata
        tensors |= found
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise ValueError(f"its parts hold {len(tensors)} tensors, and it promises "
                         f"{metadata['split.tensors.count']}")
    return metadata, tensors


def read_file(path):
    """One GGUF file (Path) -> (metadata, tensors), as `read_parts`. Raises ValueError."""
    with open(path, "rb") as f:
        header = Header(f.read(HEADER_LIMIT))
    refuse_stand_in(path, header.data[:32])
    if header.data[:4] != b"GGUF":
        raise ValueError(f"it is not a GGUF file, for it begins with {header.data[:16]!r}")
    header.skip(4)
    version = header.value(UINT32)
    if version not in (2, 3):
        raise ValueError(f"its GGUF version is {version}; supported are 2 and 3, little-endian")
    n_tensors, n_entries = header.value(UINT64), header.value(UINT64)
    if max(n_tensors, n_entries) > COUNT_LIMIT:
        raise ValueError(f"its header claims {n_tensors} tensors and {n_entries} metadata entries")
    metadata = {header.value(STRING): header.value(header.value(UINT32))
                for _ in range(n_entries)}
    records = {}
    for _ in range(n_tensors):
        name, n_dims = header.value(STRING), header.value(UINT32)
        if name in records or not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {name[:80]!r} appears twice or has {n_dims} dimensions")
        shape = tuple(header.array(UINT64, n_dims).tolist()[::-1])  # innermost comes first
        records[name] = shape, header.value(UINT32), header.value(UINT64)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    return metadata, place_tensors(path, records, header.at, alignment)


def place_tensors(path, records, header_end, alignment):
    """{name: (shape, type number, offset after the header)} -> tensors, as `read_parts`.

    The tensors must lie one after the other and fill the file. Anything else is a mistake in
    a type, a size or an offset, and would mean wrong weights.
    """
    size = os.path.getsize(path)
    start = end = -(-header_end // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in records.items():
        try:
            quant = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quant]
            dequantize(np.zeros((1, block_bytes), np.uint8), quant)  # can it be?
        except (ValueError, NotImplementedError):
            raise ValueError(f"tensor {name} has type {kind}, which is not supported; use "
                             "another one") from None
        n_bytes = math.prod(shape) // block * block_bytes
        if shape[-1] % block or start + offset + n_bytes > size:
            raise ValueError(f"tensor {name}, {quant.name} {list(shape)} at byte "
                             f"{start + offset}, does not fit in the file's {size} bytes; "
                             "the file is damaged, its download unfinished, or it was cut into "
                             "pieces, which must be joined")
        if start + offset != end:
            raise ValueError(f"tensor {name} is at byte {start + offset}, but the one before "
                             f"it ends at {end}; the file is damaged")
        tensors[name] = shape, quant, end, path
        end += -(-n_bytes // alignment) * alignment
    if size > end:
        raise ValueError(f"its tensors end at byte {end}, but it has {size}; the file is "
                         "damaged")
    return tensors


class Header:
    """A cursor over the file's first bytes. It never reads past their end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def skip(self, n):
        """Move n bytes on; returns where they start."""
        if n > len(self.data) - self.at:
            raise ValueError(f"its header ends early or is larger than {HEADER_LIMIT >> 20} MiB "
                             f"(at byte {self.at})")
        self.at += n
        return self.at - n

    def array(self, kind, count):
        """`count` numbers of one type, as a NumPy array."""
        if kind not in SCALARS:
            raise ValueError(f"its header has a value of unknown type {kind} at byte {self.at}")
        dtype = np.dtype(SCALARS[kind])
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def strings(self, count):
        """`count` strings, each a uint64 length, then UTF-8."""
        data, at, end, found = self.data, self.at, len(self.data), []
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):  # without a call, for there are 100,000s
            if end - at < 8 or (n := length(data, at)[0]) > end - at - 8:
                self.at = at
                self.skip(end)
            at += 8 + n
            found.append(data[at - n:at])
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError:
            raise ValueError("its header has a string that is not UTF-8") from None

    def value(self, kind):
        """One value of a type: a number, a bool, a string, or a flat array of one of these."""
        if kind == STRING:
            return self.strings(1)[0]
        if kind == ARRAY:
            kind, count = self.value(UINT32), self.value(UINT64)
            return self.strings(count) if kind == STRING else self.array(kind, count)
        return self.array(kind, 1)[0].item()
