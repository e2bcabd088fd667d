"""Bytes of arrays as they are stored: tiles, padding, memory spaces.  Every number is worked out by hand."""

import pytest

from shardlab.hlo.layout import HOST, leaves, stored

# Bytes stored, of them padding.
SIZES: dict[str, tuple[str, int, int]] = {
    "no tiles": ("f32[3,5]{1,0}", 60, 0),
    "whole tiles": ("f32[16,256]{1,0:T(8,128)}", 16384, 0),
    "minor dim padded": ("f32[16,100]{1,0:T(8,128)}", 16 * 128 * 4, 16 * 28 * 4),
    "both minor dims padded": ("f32[2,9,100]{2,1,0:T(8,128)}", 2 * 16 * 128 * 4, (2 * 16 * 128 - 1800) * 4),
    "the layout says which dim is minor": ("f32[100,16]{0,1:T(8,128)}", 128 * 16 * 4, 28 * 16 * 4),
    "a head dim of 64": ("bf16[4,2048,16,64]{3,1,2,0:T(8,128)(2,1)}", 2**25, 2**24),
    "pairs of rows are packed": ("bf16[7,128]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, 128 * 2),
    "small tiles": ("s32[3,4]{0,1:T(4,128)}", 4 * 128 * 4, (4 * 128 - 12) * 4),
    "one dim": ("f32[1000]{0:T(1024)}", 4096, 96),
    "a scalar": ("f32[]{:T(128)}", 512, 508),
    "more tile than array": ("bf16[130]{0:T(8,128)(2,1)}", 8 * 256 * 2, 8 * 256 * 2 - 260),
    "a bit is a byte": ("pred[100]{0:T(512)(128)(4,1)}", 512, 412),
    "packed fours": ("s4[8]{0:E(4)}", 4, 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_bytes(name: str) -> None:
    text, size, padding = SIZES[name]
    (one,) = stored(text)
    assert (one.stored, one.padding, one.space) == (size, padding, 0)


def test_spaces_and_the_leaves_of_tuples() -> None:
    text = "((f32[2]{0:S(5)}, token[]), /*index=1*/(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}), u32[]{:S(2)})"
    assert [(index, one and one.space) for index, one in leaves(text)] == [
        ((0, 0), HOST),
        ((0, 1), None),
        ((1, 0), 1),
        ((2,), 2),
    ]
    assert [one.stored for one in stored(text)] == [8, 2048, 4]
