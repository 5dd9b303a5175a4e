"""Bytes of a tensor, and the same in less room: which elements are not zero, and the planes of their bytes, compressed.

An element is zero when all its bytes are; so -0.0, NaNs of every kind and denormals come back as they were. The format
is written down in docs/formats.md. numpy, because finding and moving single elements is five times faster with it than
with torch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

MAGIC = b"OBP1"
PREAMBLE = struct.Struct("<4sIIIQ")
"""MAGIC, bytes an element, sum, 0, elements."""
CHUNK = 2**18
"""Elements that are packed together: they and all that is made of them fit into a processor's cache."""
LENGTH = np.dtype("<u4")
SIZES = (1, 2, 4, 8)
"""Bytes an element can have."""
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Damaged(Exception):
    """Bytes that are not as `pack` made them. The text says what is wrong."""


def pack(dense: Bytes, size: int, seed: int, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    """The pieces of a packed tensor, one after another. dense: its bytes; size: of an element; seed: begins the sum;
    compressor: from make_compressor, for all tensors of a file, since making one takes as long as a small tensor.
    """
    words, crc = dense.view(f"<u{size}"), seed
    lengths: list[int] = []
    pieces: list[bytes] = []
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK]
        crc = zlib.crc32(chunk.data, crc)
        parts = [_squeezed(part, compressor) for part in _parts(chunk, size)]
        lengths += map(len, parts)
        pieces += parts
    return [PREAMBLE.pack(MAGIC, size, crc, 0, len(words)), np.array(lengths, LENGTH).tobytes(), *pieces]


def unpack(packed: Bytes, size: int, count: int, seed: int) -> Bytes:
    """The dense bytes. size, count, seed: as the tensor should have them. Raises Damaged for all that is not so."""
    lengths, rest = _table(packed, size, count)
    dense = torch.zeros(count * size, dtype=torch.uint8).numpy()  # aligned: how products round hangs on it
    words, crc, at = dense.view(f"<u{size}"), seed, 0
    decompressor = zstandard.ZstdDecompressor()
    for row, start in zip(lengths, range(0, count, CHUNK), strict=True):
        chunk, ends = words[start : start + CHUNK], [at, *(at + np.cumsum(row)).tolist()]
        _fill(chunk, [rest[begin:end] for begin, end in pairwise(ends)], decompressor)
        crc, at = zlib.crc32(chunk.data, crc), ends[-1]
    told = PREAMBLE.unpack(packed[: PREAMBLE.size].data)[2]
    if crc != told:
        raise Damaged(f"its sum is {crc:08x} and should be {told:08x}")
    return dense


def bytes_of(tensor: Tensor) -> Bytes:
    """A tensor's bytes in the order of its elements, as `pack` takes them."""
    found: Bytes = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return found


def make_compressor() -> zstandard.ZstdCompressor:
    """For bytes that hardly ever repeat: entropy coding is all there is to gain. A search for short matches (as zstd's
    levels do it) makes the exponents of weights larger by a tenth and takes twice the time.
    """
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=6, chain_log=6, search_log=1
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def _parts(chunk: Any, size: int) -> Iterator[Bytes]:
    """The mask, a bit an element (nothing, where no element is zero), then the planes of those that are not zero."""
    kept = chunk != 0
    some = not kept.all()
    values = chunk.take(np.flatnonzero(kept)) if some else chunk
    yield np.packbits(kept) if some else np.empty(0, np.uint8)
    for index in range(size):
        yield (values >> values.dtype.type(8 * index)).astype(np.uint8)


def _squeezed(part: Bytes, compressor: zstandard.ZstdCompressor) -> bytes:
    """Compressed where that makes it shorter."""
    compressed = compressor.compress(part.data) if part.size else b""
    return compressed if len(compressed) < part.size else part.tobytes()


def _table(packed: Bytes, size: int, count: int) -> tuple[Any, Bytes]:
    """The lengths of all parts [chunk, mask and planes], and the parts; whatever they hold, they are all there."""
    if packed.size < PREAMBLE.size:
        raise Damaged("it is cut off")
    magic, said_size, _, zero, said_count = PREAMBLE.unpack(packed[: PREAMBLE.size].data)
    if (magic, said_size, zero, said_count) != (MAGIC, size, 0, count):
        raise Damaged("it does not begin as it should")
    rows = -(-count // CHUNK)
    end = PREAMBLE.size + rows * (1 + size) * LENGTH.itemsize
    if packed.size < end:
        raise Damaged("it is cut off")
    lengths = packed[PREAMBLE.size : end].view(LENGTH).reshape(rows, 1 + size).astype(np.int64)
    if lengths.sum() != packed.size - end:
        raise Damaged("its parts do not have the length they should")
    return lengths, packed[end:]


def _fill(chunk: Any, parts: list[Bytes], decompressor: zstandard.ZstdDecompressor) -> None:
    """Puts a chunk's elements where they were; all are zero before."""
    mask, *planes = parts
    kept = None
    if mask.size:
        bits = np.unpackbits(_whole(mask, -(-len(chunk) // 8), decompressor), count=len(chunk))
        kept = np.flatnonzero(bits.view(bool))
    count = len(chunk) if kept is None else len(kept)
    values = np.empty((count, len(planes)), np.uint8)
    for index, plane in enumerate(planes):
        values[:, index] = _whole(plane, count, decompressor)
    chunk[slice(None) if kept is None else kept] = values.view(chunk.dtype)[:, 0]


def _whole(part: Bytes, length: int, decompressor: zstandard.ZstdDecompressor) -> Bytes:
    """A part that has `length` bytes when it is not compressed."""
    if part.size == length:
        return part
    try:
        if zstandard.frame_content_size(part.data) != length:  # before memory is taken for it
            raise Damaged("a part of it is damaged")
        return np.frombuffer(decompressor.decompress(part.data, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise Damaged(f"a part of it is damaged ({error})") from error
