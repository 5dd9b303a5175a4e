"""Packed tensors: whatever goes in comes out, and whatever is damaged does not."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsprune.core.patterns import NofM, Unstructured
from obsprune.models import planes

SEED = 7


@pytest.fixture(autouse=True, scope="module")
def short_chunks() -> Iterator[None]:
    """Tensors of a few elements have several chunks, whole ones and a rest."""
    with mock.patch.object(planes, "CHUNK", 16):
        yield


def packed(dense: planes.Bytes, size: int) -> planes.Bytes:
    return np.frombuffer(b"".join(planes.pack(dense, size, SEED, planes.make_compressor())), np.uint8)


def there_and_back(dense: planes.Bytes, size: int) -> planes.Bytes:
    return planes.unpack(packed(dense, size), size, dense.size // size, SEED)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(planes.SIZES), st.lists(st.one_of(st.just(0), st.integers(0, 255)), max_size=300), st.data())
def test_all_bytes_come_back(size: int, values: list[int], data: st.DataObject) -> None:
    words = np.array(values[: len(values) // size * size], np.uint8).reshape(-1, size)
    words[data.draw(st.lists(st.integers(0, max(len(words) - 1, 0)), max_size=len(words)))] = 0
    dense = words.flatten()
    np.testing.assert_array_equal(there_and_back(dense, size), dense)


SPECIAL = {
    torch.float32: [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 1, 0x807FFFFF],
    torch.bfloat16: [0x8000, 0x7FC1, 0xFFFF, 0x7F80, 1, 0x807F],
    torch.float16: [0x8000, 0x7E01, 0xFFFF, 0x7C00, 1, 0x83FF],
}


@pytest.mark.parametrize("dtype", SPECIAL)
def test_negative_zeros_nans_infinities_and_denormals_keep_their_bits(dtype: torch.dtype) -> None:
    words = np.array([0, *SPECIAL[dtype], 0] * 9, f"<u{dtype.itemsize}")
    np.testing.assert_array_equal(there_and_back(words.view(np.uint8), dtype.itemsize), words.view(np.uint8))


def test_without_zeros_there_is_no_mask_and_without_a_pattern_the_bytes_are_plain() -> None:
    dense = np.random.default_rng(0).integers(1, 256, 64).astype(np.uint8)
    small = packed(dense, 1)
    assert small.size == planes.PREAMBLE.size + 4 * 2 * 4 + 64
    np.testing.assert_array_equal(small[-64:], dense)


@pytest.mark.parametrize("size", planes.SIZES)
def test_nothing_is_little(size: int) -> None:
    assert packed(np.empty(0, np.uint8), size).size == planes.PREAMBLE.size
    assert there_and_back(np.empty(0, np.uint8), size).size == 0


def shares(pattern: Unstructured | NofM, dtype: torch.dtype) -> tuple[float, float]:
    """Of the dense bytes, and the mask's bits an element, for a large matrix of the shape that weights have."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    dense = planes.bytes_of(weight.masked_fill(~pattern.keep(weight.abs()), 0).to(dtype))
    with mock.patch.object(planes, "CHUNK", 2**18):
        pieces = planes.pack(dense, dtype.itemsize, SEED, planes.make_compressor())
    lengths = np.frombuffer(pieces[1], planes.LENGTH).reshape(-1, 1 + dtype.itemsize)
    return sum(map(len, pieces)) / dense.size, int(lengths[:, 0].sum()) * 8 / weight.numel()


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.41), (0.6, 0.34), (0.7, 0.27)])
def test_sparse_matrices_become_as_small_as_promised(sparsity: float, most: float) -> None:
    assert shares(Unstructured(sparsity), torch.bfloat16)[0] < most


@pytest.mark.parametrize(("n", "m", "index_bits"), [(2, 4, 3 / 4), (1, 4, 2 / 4), (4, 8, 7 / 8)])
def test_masks_of_n_in_m_take_no_more_than_the_number_of_their_pattern(n: int, m: int, index_bits: float) -> None:
    """ceil(log2(m over n)) bits a group would number the patterns."""
    assert shares(NofM(n, m), torch.bfloat16)[1] < 1.01 * index_bits


@pytest.mark.parametrize("chunk", [16, 2**18])
def test_flipped_bits_are_seen_wherever_they_are(chunk: int) -> None:
    words = np.random.default_rng(0).normal(size=400).astype(np.float16)
    words[::3] = 0
    dense, seen = words.view(np.uint8), 0
    with mock.patch.object(planes, "CHUNK", chunk):
        good = packed(dense, 2)
        for position in range(good.size):
            bad = good.copy()
            bad[position] ^= 1 << position % 8
            try:
                np.testing.assert_array_equal(planes.unpack(bad, 2, 400, SEED), dense)
            except planes.Damaged:
                seen += 1
    assert seen > 0.99 * good.size  # some bits of a zstd frame mean nothing, nor do those behind the end of a mask


def test_what_is_cut_off_or_too_long_is_seen() -> None:
    good = packed(planes.bytes_of(torch.arange(100)), 8)
    for length in range(good.size):
        with pytest.raises(planes.Damaged):
            planes.unpack(good[:length], 8, 100, SEED)
    with pytest.raises(planes.Damaged):
        planes.unpack(np.append(good, np.uint8(0)), 8, 100, SEED)


@pytest.mark.parametrize(("size", "count", "seed"), [(4, 100, SEED), (8, 99, SEED), (8, 2**40, SEED), (8, 100, 8)])
def test_a_tensor_is_not_taken_for_another(size: int, count: int, seed: int) -> None:
    with pytest.raises(planes.Damaged):
        planes.unpack(packed(planes.bytes_of(torch.arange(100)), 8), size, count, seed)


def test_a_frame_that_claims_to_be_huge_takes_no_memory() -> None:
    huge = mock.patch.object(planes.zstandard, "frame_content_size", return_value=2**62)
    with mock.patch.object(planes, "CHUNK", 2**18):
        good = packed(planes.bytes_of(torch.zeros(1000, dtype=torch.int64)), 8)
        with huge, pytest.raises(planes.Damaged, match="a part of it"):
            planes.unpack(good, 8, 1000, SEED)
