"""CCS over scores that are spread over ranks."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.inputs import sorted_labels
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_dense, as_integer, as_vector, at_least_one, compute_dtype, one_of
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.order import kth_smallest, lowest, ordered_bits, values_of_bits
from flashcoreset.distributed.problem import shard_labels
from flashcoreset.methods.ccs import check_ratio, warn_of_empty, warn_of_no_cut
from flashcoreset.methods.ccs.cutoff import published_ratio
from flashcoreset.methods.ccs.strata import KINDS, Strata, budgets, by_width, filled_share, small_type


def ccs(
    scores_shard: Any,
    k: int,
    *,
    mislabel_scores: Any = None,
    mislabel_ratio: float | None = None,
    n_strata: int = 50,
    strata: str = "width",
    groups: Any = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Coreset:
    """Coverage-centric selection from all ranks' scores: what `fc.ccs` returns for them, rank after rank.

    Strata are cut, and samples drawn, by counts that are summed over the ranks: no rank gets the others' scores.

    Args:
        scores_shard: [n of this rank] as in `fc.ccs`; a rank may have none.
        k: how many to take from all ranks.
        mislabel_scores, groups: [n of this rank], as in `fc.ccs`.
        mislabel_ratio, n_strata, strata, seed: as in `fc.ccs`, the same on every rank.
        group: the process group; None is the default one.

    Returns:
        Coreset, the same on every rank: `indices` are global, and `info` has the entries of `fc.ccs` and "bytes" and "collectives".

    Raises:
        TypeError, ValueError: as `fc.ccs` does, on every rank, naming the rank.
        RankError: if a rank ends or hangs.

    Source: Zheng, Liu, Lai and Prakash, ICLR 2023, algorithm 1.

    Example:
        >>> import torch, flashcoreset as fc
        >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 9.9, 10.0])
        >>> fc.distributed.ccs(scores, 4, n_strata=3).indices
        tensor([0, 2, 5, 6])
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        options: dict[str, Any] = {}
        own: tuple[int, dict[int, int]] = (0, {})
        suspects = labels = None
        try:
            k = at_least_one(k, "k")
            n_strata = at_least_one(n_strata, "n_strata")
            if n_strata > 1 << 24:
                raise ValueError(f"n_strata must be <= {1 << 24}, got {n_strata}")
            one_of(strata, "strata", KINDS)
            given = mislabel_ratio is not None
            ratio = check_ratio(mislabel_ratio, "mislabel_ratio") if given else 0.0
            seed = as_integer(seed, "seed")
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed must be in [0, 2**64), got {seed}")
            if isinstance(scores_shard, dict):
                if "aum" not in scores_shard:
                    raise ValueError("scores_shard must have the entry aum")
                scores_shard = scores_shard["aum"]
                mislabel_scores = scores_shard if mislabel_scores is None else mislabel_scores
            elif ratio > 0 and mislabel_scores is None:
                raise ValueError(f"mislabel_scores must be given with mislabel_ratio={ratio}, got None")
            values, device, dtype = _values(scores_shard, "scores_shard", None)
            if mislabel_scores is not None:
                suspects, _, _ = _values(mislabel_scores, "mislabel_scores", len(values))
            if groups is not None:
                labels = shard_labels(groups, len(values))
            if strata == "log" and (values < 0).any():
                place = int((values < 0).argmax())
                raise ValueError(
                    f"scores_shard must be >= 0 with strata='log', got {values[place]} at position {place}; pass strata='quantile'"
                )
            options = {
                "k": k, "n_strata": n_strata, "strata": strata, "mislabel_ratio": mislabel_ratio, "seed": seed,
                "mislabel_scores": "None" if suspects is None else "given", "groups": "None" if labels is None else "given",
                "dtype": str(dtype),
            }  # fmt: skip
            own = (len(values), {0: len(values)} if labels is None else Counter(labels))
        except (TypeError, ValueError) as caught:
            error = caught
        parts = comm.agree(options, error, own)
        counts = [part[0] for part in parts]
        n, first = sum(counts), sum(counts[: comm.rank])
        if k > n:
            raise ValueError(f"k must be <= the {n} samples, got {k}")
        origin = "argument"
        if not given:
            ratio, origin = published_ratio(n, k)
            if suspects is None:
                if ratio >= 0.1 and n_strata > 1 and comm.rank == 0:
                    warn_of_no_cut(n, k, ratio)
                ratio, origin = 0.0, "none"
        code = sorted_labels((label for part in parts for label in part[1]), "groups")
        present = list(code)
        total = {label: sum(part[1].get(label, 0) for part in parts) for label in present}
        codes = np.array([0] * len(values) if labels is None else [code[label] for label in labels])
        members = [np.flatnonzero(codes == place) for place in range(len(present))]
        dropped = 0
        if suspects is not None and ratio > 0:
            drops = [math.floor(ratio * total[label]) for label in present]
            masks = lowest(comm, [ordered_bits(suspects[some]) for some in members], drops)
            members = [some[~mask] for some, mask in zip(members, masks, strict=True)]
            dropped = sum(drops)
            for label, drop in zip(present, drops, strict=True):
                total[label] -= drop
        if k > n - dropped:
            raise ValueError(
                f"k must be <= the {n - dropped} samples that mislabel_ratio={ratio} leaves of {n}, got {k}"
            )
        shares = allocate_budgets([total[label] for label in present], k).tolist()
        keys = _keys(seed, first, len(values))
        picks, infos = [], []
        for some, share in zip(members, shares, strict=True):
            stratum, edges = _cut(comm, values[some], n_strata, strata)
            sizes_of = comm.sum(torch.from_numpy(np.bincount(stratum, minlength=n_strata))).numpy()
            taken = budgets(sizes_of, share).tolist()
            order = np.argsort(stratum, kind="stable")
            own_sizes = np.bincount(stratum, minlength=n_strata)
            strata_members = np.split(some[order], own_sizes.cumsum()[:-1])
            few = [count for count, size in zip(taken, sizes_of, strict=True) if 0 < count < size]
            drawn = [
                keys[part]
                for part, count, size in zip(strata_members, taken, sizes_of, strict=True)
                if 0 < count < size
            ]
            left = iter(lowest(comm, drawn, few) if few else [])
            chosen = [
                part if count == size else part[next(left)] if count else part[:0]
                for part, count, size in zip(strata_members, taken, sizes_of.tolist(), strict=True)
            ]
            picks.append(_together(comm, chosen, first))
            if strata != "quantile" and filled_share(sizes_of) < 0.5 and comm.rank == 0:
                warn_of_empty(Strata(edges, sizes_of, np.empty(0)), taken, strata)
            infos.append({"edges": edges.tolist(), "sizes": sizes_of.tolist(), "counts": taken})
        info: dict[str, Any] = {
            "dropped": dropped,
            "mislabel_ratio": ratio,
            "mislabel_ratio_from": origin,
        }
        if labels is None:
            info |= infos[0]
        else:
            info["groups"] = dict(zip(present, infos, strict=True))
        info |= {"bytes": comm.bytes, "collectives": comm.collectives}
        indices = torch.cat(picks).to(device)
        return Coreset(indices, torch.ones(len(indices), dtype=dtype, device=device), info)


def _values(value: Any, name: str, length: int | None) -> tuple[np.ndarray, torch.device, torch.dtype]:
    device, dtype = torch.device("cpu"), torch.float32
    if not isinstance(value, (list, tuple, range)):
        value = as_dense(value, name)
        device, dtype = value.device, compute_dtype(value.dtype)
    vector = as_vector(value, name, device, integers=False, length=length).cpu().numpy()
    bad = np.isnan(vector)
    if bad.any():
        raise ValueError(f"{name} must not be NaN, got NaN at position {int(bad.argmax())}")
    return vector, device, dtype


def _keys(seed: int, first: int, count: int) -> np.ndarray:
    """The keys [count] uint64 of the samples first, first + 1, ...; see methods/ccs/strata.py."""
    stream = np.random.Philox(key=seed)
    stream.advance(first // 4)  # a counter gives four numbers
    return np.asarray(stream.random_raw(first % 4 + count)[first % 4 :])


def _cut(comm: Communicator, values: np.ndarray, n_strata: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The stratum of each value [n] of this rank, and the edges [n_strata + 1]."""
    small = small_type(n_strata)
    if kind == "quantile":
        total = int(comm.sum(torch.tensor([len(values)]))[0])
        at = np.arange(n_strata) * total // n_strata
        ordered = np.sort(ordered_bits(values))
        (found,) = kth_smallest(comm, [ordered], [np.append(at, total - 1) + 1])
        edges = values_of_bits(found)
        return np.searchsorted(edges[1:-1], values, side="right").astype(small), edges
    if kind == "width":
        low, high = _span(comm, values)
        return by_width(values, low, high, n_strata, small)
    with np.errstate(divide="ignore"):
        logs = np.log(values)
    low, high = _span(comm, logs)
    place, edges = by_width(logs, low, high, n_strata, small)
    edges = np.exp(edges)
    finite = values[np.isfinite(logs)]
    least = -comm.most(float(-finite.min()) if len(finite) else -math.inf)
    greatest = comm.most(float(finite.max()) if len(finite) else -math.inf)
    if least <= greatest:
        edges[0], edges[-1] = least, greatest
    return place, edges


def _span(comm: Communicator, values: np.ndarray) -> tuple[float, float]:
    """The least and the greatest finite value of all ranks; (0, 0) if there is none."""
    finite = values[np.isfinite(values)]
    low = -comm.most(float(-finite.min()) if len(finite) else -math.inf)
    high = comm.most(float(finite.max()) if len(finite) else -math.inf)
    return (low, high) if low <= high else (0.0, 0.0)


def _together(comm: Communicator, chosen: list[np.ndarray], first: int) -> torch.Tensor:
    """The chosen samples of all ranks, stratum by stratum, ascending in each."""
    stratum = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
    pairs = torch.from_numpy(np.stack([stratum, np.concatenate(chosen) + first], axis=1).astype(np.int64))
    everything = torch.cat(comm.gather_rows(pairs))
    return everything[torch.argsort(everything[:, 0], stable=True), 1]
