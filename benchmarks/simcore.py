"""SimCore's order beside a full argsort: which items each of 100 centroids takes, round by round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import flashcoreset as fc
from benchmarks import data, peers
from benchmarks.checks import Disagreement, counted
from benchmarks.harness import Inputs, Row, Work
from flashcoreset.nearest_order.cpu import NearestOrder


def _similarities(n: int, lists: int, k: int) -> Inputs:
    items = data.clustered(n, 64)
    centroids = data.clustered(lists, 64, seed=1)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    return {"s": torch.from_numpy(items) @ torch.from_numpy(centroids).T, "k": k}


def _features(n: int, lists: int, d: int, k: int) -> Inputs:
    centroids = torch.from_numpy(data.clustered(lists, d, seed=1))
    return {
        "x": torch.from_numpy(data.clustered(n, d)),
        "centroids": torch.nn.functional.normalize(centroids, dim=1),
        "k": k,
    }


def _take(order: NearestOrder, lists: int, k: int, read: Callable[[], None]) -> list[list[int]]:
    """All rounds until ``k`` items are taken, with the lengths of list that ``fc.simcore`` starts and goes on with."""
    length = max(64, 4 * -(-k // lists))
    rounds: list[list[int]] = []
    while order.taken < k:
        order.begin(length)
        read()
        order.finish()
        counts: list[int] = [0]
        while counts and order.taken < k:
            items, counts, *_ = order.rounds(max(1, 65_536 // lists), k)
            rounds += [piece.tolist() for piece in items.split(counts)] if counts else []
        length *= 4
    return rounds


def _ours_from_similarities(inputs: Inputs) -> list[list[int]]:
    lists = inputs["s"].shape[1]
    order = NearestOrder.of_similarities(lists)
    return _take(order, lists, inputs["k"], lambda: order.update_similarities(inputs["s"]))


def _ours_from_features(inputs: Inputs) -> list[list[int]]:
    order = NearestOrder(inputs["centroids"])
    return _take(order, len(inputs["centroids"]), inputs["k"], lambda: order.update(inputs["x"]))


def _same_rounds(inputs: Inputs, ours: list[list[int]], peer: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Replays the rounds on the peer's sorted lists, which are all that its own rounds would read.

    A list's item may differ if the peer's similarities tie within the rounding of a product.
    """
    similarities, order = (tensor.numpy() for tensor in peer)
    rounding = 1e-6 * float(np.abs(similarities).max())
    taken = np.zeros(similarities.shape[0], dtype=bool)
    places = np.zeros(order.shape[0], dtype=np.int64)
    ties = 0
    for number, round_items in enumerate(ours):
        expected = []
        for index, items in enumerate(order):
            while taken[items[places[index]]]:
                places[index] += 1
            expected.append(int(items[places[index]]))
        if round_items != list(dict.fromkeys(expected)):
            if taken[round_items].any():
                raise Disagreement(f"round {number} takes an item again")
            for index, item in enumerate(expected):
                best = similarities[round_items, index].max()
                if abs(float(best) - float(similarities[item, index])) > rounding:
                    raise Disagreement(f"round {number}: list {index} took {best:.9g}, item {item} has more")
            ties += 1
        taken[round_items] = True
    if taken.sum() < inputs["k"]:
        raise Disagreement(f"{taken.sum()} items, expected {inputs['k']}")
    return f"same {len(ours)} rounds" + (f" but for {counted(ties, 'rounding tie')}" if ties else "")


def _large_target(n: int, m: int, d: int, clusters: int) -> Inputs:
    return {
        "openset": torch.from_numpy(data.clustered(n, d)),
        "target": torch.from_numpy(data.clustered(m, d, seed=1)),
        "clusters": clusters,
    }


def _choose(inputs: Inputs, n_init: int | None) -> fc.Coreset:
    clusters = inputs["clusters"]
    return fc.simcore(inputs["openset"], inputs["target"], clusters, n_clusters=clusters, n_init=n_init)


def _as_similar(inputs: Inputs, ours: fc.Coreset, peer: fc.Coreset) -> str:
    """How similar the target is to its centroids, by either."""
    target = torch.nn.functional.normalize(inputs["target"], dim=1)
    found, expected = (
        float((target @ chosen.info["centroids"].T).amax(1).double().mean()) for chosen in (ours, peer)
    )
    if not found >= 0.99 * expected:
        raise Disagreement(f"similarity of the target to its centroids: {found:.4f} and {expected:.4f}")
    return f"similarity of the target to its centroids {found:.4f}, with ten starts {expected:.4f}"


FROM_SIMILARITIES = Row(
    name="order",
    title="order for 10,000 picks from the similarities of 200,000 items to 100 centroids",
    make=_similarities,
    size={"n": 200_000, "lists": 100, "k": 10_000},
    small={"n": 1_000, "lists": 10, "k": 100},
    ours=_ours_from_similarities,
    peer=lambda inputs: peers.full_order(inputs["s"]),
    peer_name="torch.argsort of every list (its rounds not counted)",
    check=_same_rounds,
    work=lambda n, lists, k: Work("copy", 4.0 * n * lists),
    goal=20,
)
ROWS = [
    FROM_SIMILARITIES,
    Row(
        name="order-from-features",
        title="order for 10,000 picks from 200,000 x 128 features and 100 centroids",
        make=_features,
        size={"n": 200_000, "lists": 100, "d": 128, "k": 10_000},
        small={"n": 1_000, "lists": 10, "d": 16, "k": 100},
        ours=_ours_from_features,
        peer=lambda inputs: peers.full_order_of_features(inputs["x"], inputs["centroids"]),
        peer_name="normalize, torch.mm and torch.argsort (its rounds not counted)",
        check=_same_rounds,
        work=lambda n, lists, d, k: Work("matrix", 2.0 * n * lists * d),
    ),
    Row(
        name="large-target",
        title="100 picks of 20,000 x 64 features for a target of 50,000, k-means of the target included",
        make=_large_target,
        size={"n": 20_000, "m": 50_000, "d": 64, "clusters": 100},
        small={"n": 300, "m": 500, "d": 8, "clusters": 5},
        ours=lambda inputs: _choose(inputs, None),
        peer=lambda inputs: _choose(inputs, 10),
        peer_name="the same with ten starts of k-means, the default until this release",
        check=_as_similar,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
