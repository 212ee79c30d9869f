"""Every public function in a child of a process that has called it before: run as a script by test_fork.py.

    python tests/forked_calls.py fork|spawn|forkserver|dataloader

prints what became of each call in the child, as JSON: "same" as in the parent, to the bit, or what else.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.nearest_order.cpu import NearestOrder

LIMIT = 60  # seconds for one call in a child, which takes a fraction of a second


def points(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Large enough for the threads of torch, scikit-learn and our own.
X = points(4000, 32)
Y = points(300, 32, 1)
NORMS = torch.rand(2000, generator=torch.Generator().manual_seed(2))
LABELS = (X[:, 0] > 0).long()


def tensors(result: Any) -> list[Tensor]:
    """The tensors in a result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, (tuple, list)):
        names = (
            "indices",
            "weights",
            "gains",
            "f",
            "g",
            "coefficients",
            "sketches",
            "norms",
            "loss",
            "entropy",
        )
        result = [getattr(result, name) for name in names if isinstance(getattr(result, name, None), Tensor)]
    return [tensor for part in result for tensor in tensors(part)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(50, 64)
            self.layers = nn.ModuleList([nn.ModuleDict({"v_proj": nn.Linear(64, 64)}) for _ in range(2)])
            self.head = nn.Linear(64, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["v_proj"](x).tanh()
        return self.head(x)


def loader() -> Any:
    model = nn.Linear(32, 2)
    with torch.no_grad():
        model.weight.copy_(Y[:2])
        model.bias.zero_()
    batches = [(X[begin : begin + 500], LABELS[begin : begin + 500]) for begin in (0, 500)]
    return fc.sketch_loader(
        model, batches, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), 64
    )


def sketcher() -> Any:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4)), X[:500]
    for i, parameter in enumerate(model.parameters()):
        parameter.data = points(1, parameter.numel(), i).view_as(parameter)
    with fc.GradientSketcher(model, 128) as found:
        nn.functional.cross_entropy(model(x), LABELS[:500]).backward()
    return found


def dynamics() -> Any:
    found = fc.TrainingDynamics(len(X))
    for epoch in range(2):
        found.update(torch.arange(len(X)), X, LABELS, epoch)
    return found.scores()


def zeroth_order() -> Any:
    weight, x = nn.Parameter(points(32, 8)), X[:1000]
    return fc.zeroth_order_gradients(lambda: (x @ weight).square().sum(1), [weight])


def selector() -> Any:
    tokens = torch.arange(16 * 20).view(16, 20) % 50
    return fc.integrations.torch.BatchSelector(Model()).gradients({"input_ids": tokens, "labels": tokens})


def nearest_order(order: NearestOrder) -> Any:
    order.begin(50)
    order.update(X)
    order.finish()
    return order.rounds(1, 100)[0]


def greedy(run: kernels.cpu.FacilityLocation) -> Any:
    count = run.step(5)
    found = torch.empty(count, dtype=torch.int64), torch.empty(count), torch.empty(count)
    assignment = torch.empty(len(X), dtype=torch.int64)
    run.finish(*found, assignment)
    return *found, assignment


def new_order() -> NearestOrder:
    return NearestOrder(nn.functional.normalize(Y))


def new_run() -> kernels.cpu.FacilityLocation:
    return kernels.cpu.FacilityLocation(kernels.FacilityLocationProblem(X, memory_budget=1 << 20))


CALLS: dict[str, Callable[[], Any]] = {
    "torch": lambda: X @ Y.T > 0,
    "facility_location": lambda: fc.facility_location(X, 20, backend="cpu"),
    "facility_location torch": lambda: fc.facility_location(X[:800], 20, backend="torch"),
    "sinkhorn": lambda: fc.sinkhorn(X[:500], Y, reg=1.0, max_iter=50, tol=0.0, backend="cpu"),
    "sinkhorn torch": lambda: fc.sinkhorn(X[:500], Y, reg=1.0, max_iter=50, tol=0.0, backend="torch"),
    "sinkhorn_divergence": lambda: fc.sinkhorn_divergence(X[:500], Y, reg=1.0, max_iter=50, tol=0.0),
    "simcore": lambda: fc.simcore(X, Y, 30, n_clusters=20),
    "simcore torch": lambda: fc.simcore(X, Y, 30, n_clusters=20, backend="torch"),
    "goracs": lambda: fc.goracs(X[:2000], Y, NORMS, 20, lam=0.5, max_exchanges=5),
    "goracs sinkhorn": lambda: fc.goracs(
        X[:2000], Y, NORMS, 20, max_exchanges=2, solver="sinkhorn", reg=0.05
    ),
    "autocoreset": lambda: fc.autocoreset(
        X.numpy(), LABELS.numpy(), "logistic_regression", "logistic_regression", 60
    ),
    "caratheodory": lambda: fc.caratheodory(X),
    "match_gradients": lambda: fc.match_gradients(X, 10, backend="cpu"),
    "match_gradients omp": lambda: fc.match_gradients(X, 10, method="omp"),
    "match_gradients frank_wolfe": lambda: fc.match_gradients(X, 10, method="frank_wolfe"),
    "match_gradients caratheodory": lambda: fc.match_gradients(X, 40, method="caratheodory"),
    "matching_error": lambda: torch.tensor(fc.matching_error(X, range(40))),
    "small_sources": lambda: torch.tensor(fc.small_sources(LABELS, share=0.6)),
    "colm": lambda: fc.select("colm", grads=X, k=16, top=16),
    "ccs": lambda: fc.ccs(X[:, 0], 300),
    "coverage_auc": lambda: torch.tensor(fc.coverage_auc(X, range(300))),
    "tune_ccs": lambda: fc.tune_ccs({"aum": X[:, 0]}, 300, lambda chosen: float(X[chosen, 1].sum())),
    "top_scores": lambda: fc.top_scores(X[:, 0], 300),
    "random_subset": lambda: fc.random_subset(4000, 300),
    "k_center": lambda: fc.k_center(X, 30),
    "nearest": lambda: fc.nearest(X, Y, 30),
    "sketch": lambda: fc.sketch(X, 64),
    "sketch srht": lambda: fc.sketch(X, 16, kind="srht"),
    "projection_matrix": lambda: fc.projection_matrix(5000, 64),
    "sample_scores": lambda: fc.sample_scores(X, LABELS),
    "TrainingDynamics": dynamics,
    "GradientSketcher": sketcher,
    "sketch_loader": loader,
    "zeroth_order_gradients": zeroth_order,
    "BatchSelector": selector,
    "kernels.pairwise": lambda: kernels.cpu.pairwise(X, Y, metric="l1"),
    "kernels.NearestOrder": lambda: nearest_order(new_order()),
    "kernels.FacilityLocation": lambda: greedy(new_run()),
    "allocate_budgets": lambda: fc.allocate_budgets([17, 12, 8], 17),
}


def inherited() -> dict[str, Callable[[], Any]]:
    """Calls with objects that the parent has made and used, whose threads a forked child does not have."""
    held: dict[str, Any] = {"order": new_order(), "run": new_run()}
    nearest_order(held["order"])
    greedy(held["run"])
    return {
        "an inherited NearestOrder": lambda: nearest_order(held["order"]),
        "the end of a NearestOrder": lambda: held.update(order=None) or X[0],
        "an inherited FacilityLocation": lambda: greedy(held["run"]),
        "the end of a FacilityLocation": lambda: held.update(run=None) or X[0],
    }


def digest(call: Callable[[], Any]) -> str:
    """A digest of the bits of a result, or of the exception raised."""
    try:
        found = tensors(call())
        assert found
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    whole = hashlib.blake2b(digest_size=8)
    for tensor in found:
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def child(names: Iterable[str], calls: dict[str, Callable[[], Any]] | None, answers: Any) -> None:
    for name in names:
        answers.send(digest((CALLS if calls is None else calls)[name]))


def in_processes(method: str, calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """The digests of the calls in children; a child that does not answer is ended, and another goes on with the rest."""
    context, found, left = multiprocessing.get_context(method), {}, list(calls)
    while left:
        here, there = context.Pipe(duplex=False)
        # Objects that are not of this module cannot be sent to a fresh process, and are missing there.
        process = context.Process(target=child, args=(left, calls if method == "fork" else None, there))
        process.start()
        there.close()
        while left:
            if not here.poll(LIMIT):
                found[left.pop(0)] = "hangs"
                break
            try:
                found[left[0]] = here.recv()
                left.pop(0)
            except EOFError:
                process.join()
                found[left.pop(0)] = f"ended the process with {process.exitcode}"
                break
        process.kill()
        process.join()
    return found


class Calls(torch.utils.data.Dataset[str]):
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> str:
        return digest(CALLS[self.names[i]])


def in_workers(names: list[str]) -> dict[str, str]:
    loader = torch.utils.data.DataLoader(
        Calls(names), batch_size=None, num_workers=1, timeout=LIMIT, multiprocessing_context="fork"
    )
    found: dict[str, str] = {}
    try:
        for name, answer in zip(names, loader, strict=True):
            found[name] = answer
    except RuntimeError as error:
        found[names[len(found)]] = f"hangs: {error}"
    return {name: found.get(name, "not reached") for name in names}


def main(method: str) -> None:
    torch.set_num_threads(2)
    calls = {**CALLS, **inherited()} if method == "fork" else CALLS
    for name in CALLS:
        digest(CALLS[name])  # starts every pool of threads
    found = in_workers(list(CALLS)) if method == "dataloader" else in_processes(method, calls)
    expected = {name: digest(call) for name, call in calls.items()}
    print(json.dumps({
        name: "same" if found[name] == expected[name] and ":" not in found[name] else f"{found[name]}, not {expected[name]}"
        for name in calls
    }))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "forkserver":
        multiprocessing.set_forkserver_preload(["forked_calls"])
    main(sys.argv[1])
