"""Philox4x32, the counter-based random number generator of every backend, in NumPy.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """The random blocks [..., 4] uint32 of the counters [..., 4] uint32 under a key of two 32-bit words.

    Ten rounds are the generator's default; seven are the fewest that pass all tests of BigCrush (table 2 of the paper).
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for round_ in range(rounds):
        k0 = np.uint64((key[0] + round_ * _WEYL_0) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + round_ * _WEYL_1) & 0xFFFFFFFF)
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _HALF) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _HALF) ^ c3 ^ k1,
            product_0 & _LOW,
        )
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1), 53 bits each, from row `row` of the stream of `seed`.

    Block b of a row has the counter (row low, row high, b low, b high) and the key (seed low, seed high), and
    gives two numbers.
    """
    block = np.arange((count + 1) // 2, dtype=np.uint64)
    counter = np.empty((len(block), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = row & 0xFFFFFFFF, row >> 32
    counter[:, 2], counter[:, 3] = block & _LOW, block >> _HALF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.uint64)
    high, low = words[:, 0::2] >> np.uint64(5), words[:, 1::2] >> np.uint64(6)  # 27 and 26 bits
    return ((high << np.uint64(26) | low).astype(np.float64) * 2.0**-53).reshape(-1)[:count]
