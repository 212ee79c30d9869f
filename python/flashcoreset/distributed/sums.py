"""Sums over the ranks that have the bits of one machine's sums."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from flashcoreset.distributed.communication import Communicator


def ordered_sum(comm: Communicator, terms: np.ndarray) -> float:
    """The sum of all ranks' terms [n] float64, one after the other in their order, as a loop makes it."""

    def add(state: Tensor) -> Tensor:
        return torch.from_numpy(np.add.accumulate(np.concatenate([state.numpy(), terms]))[-1:].copy())

    return float(comm.fold(torch.zeros(1, dtype=torch.float64), add))


def ordered_counts(comm: Communicator, owner: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """[k] float64 on the CPU: for each position the sum of the weights of the clients that it owns, in the clients' order."""
    served = owner[owner >= 0].cpu()
    if weights is None:
        return comm.sum(torch.bincount(served, minlength=k)).double()
    w = weights.cpu()[owner.cpu() >= 0].numpy()
    where = np.concatenate([np.arange(k), served.numpy()])

    def add(state: Tensor) -> Tensor:
        return torch.from_numpy(np.bincount(where, np.concatenate([state.numpy(), w]), minlength=k))

    return comm.fold(torch.zeros(k, dtype=torch.float64), add)


def exact_sum(comm: Communicator, terms: np.ndarray) -> float:
    """The sum of all ranks' finite terms [n] float64, rounded once, as math.fsum rounds it; infinite if that overflows."""
    mantissa, exponent = np.frexp(terms)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    total = Fraction(0)
    for e in np.unique(exponent).tolist():
        some = whole[exponent == e]
        # In two halves of 27 bits, so that 2^36 of them fit.
        high = int((some >> 27).sum())
        low = int((some & ((1 << 27) - 1)).sum())
        total += Fraction((high << 27) + low) * Fraction(2) ** (e - 53)
    try:
        return float(sum(comm.gather_objects(total), Fraction(0)))
    except OverflowError:
        return math.inf


def row_norms(x: Tensor) -> np.ndarray:
    """The norms [n] float64 of the rows of `x` [n, d], with the bits that the compiled kernels bound products by: a row is brought
    near 1 by a power of two, and feature k goes to sum k % 8."""
    found = np.zeros(len(x))
    step = max(1, (1 << 20) // max(1, x.shape[1]))
    for begin in range(0, len(x), step):
        values = x[begin : begin + step].double().cpu().numpy()
        most = np.abs(values).max(axis=1)
        power = np.ldexp(1.0, np.clip(-np.frexp(most)[1], -1000, 1000))
        values = values * power[:, None]
        sums = np.zeros((len(values), 8))
        for k in range(0, values.shape[1], 8):
            part = values[:, k : k + 8]
            sums[:, : part.shape[1]] += part * part
        for half in (4, 2, 1):
            sums[:, :half] += sums[:, half : 2 * half]
        found[begin : begin + step] = np.where(most > 0, np.sqrt(sums[:, 0]) / power, 0)
    return found
