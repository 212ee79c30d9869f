"""GORACS over training items that are spread over ranks: stage 1 exact, stage 2 among gathered items."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.scaling import exponent_into, scale, times_power
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    at_least_one,
    check_finite,
    compute_dtype,
    one_of,
    promoted,
)
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy, SharedRows
from flashcoreset.distributed.problem import power_of_gains
from flashcoreset.distributed.selection import as_shard
from flashcoreset.facility_location.backend import choose
from flashcoreset.methods.goracs import SOLVERS, exchanged
from flashcoreset.methods.goracs import _is_held as is_held
from flashcoreset.methods.goracs.descent import Options
from flashcoreset.methods.goracs.exact_transport import load_pot
from flashcoreset.methods.goracs.transport_costs import TransportCosts, cover_picks


def goracs(
    train_shard: Any,
    valid: Any,
    grad_norms: Any = None,
    k: int | None = None,
    *,
    lam: float = 0.0,
    max_exchanges: int = 100,
    n_candidates: int = 30,
    max_solves: int | None = None,
    tol: float = 0.0,
    solver: str = "exact",
    reg: float = 1e-3,
    pool: int = 16384,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Coreset:
    """GORACS from the training items of all ranks: the picks of stage 1 are those of `fc.goracs`; stage 2 exchanges gathered items.

    Stage 1 (the greedy cover of the validation items) is one machine's, bit for bit. For stage 2 the ranks gather the picks and, for each
    validation item, its nearest items of each rank, up to `pool` in all; if all training items are no more than that, they are gathered
    in their order, and the whole result is the one of `fc.goracs`.

    Args:
        train_shard: [n of this rank, d]; a rank may have no rows. Classes (`train_labels` of `fc.goracs`) are problems of their own:
            call this once for each class, with the rows and the share of k that it has.
        valid: [V, d], the same on every rank.
        grad_norms: [n of this rank] >= 0, or None where lam is 0.
        pool: how many items stage 2 may choose from, >= k.
        group: the process group; None is the default one.

    The other arguments are those of `fc.goracs`, the same on every rank.

    Returns:
        Coreset, the same on every rank: `indices` are global; `info` has the entries of `fc.goracs` (a "certificate" holds among the
        gathered items) and "cover" ([k], the picks of stage 1), "pool" (how many items were gathered), "bytes" and "collectives".

    Raises:
        TypeError, ValueError: as `fc.goracs` does, on every rank, naming the rank.
        ImportError: if `solver` is "exact" and POT is not installed, where `fc.goracs` needs it.
        RankError: if a rank ends or hangs.

    Source: see `fc.goracs`.

    Example:
        >>> import torch, flashcoreset as fc
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.distributed.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), k=2)
        >>> coreset.indices, coreset.info["cover"]
        (tensor([1, 4]), tensor([1, 4]))
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        told: dict[str, Any] = {}
        own: tuple[int, float] = (0, 0.0)
        try:
            check_backend(backend)
            check_progress(progress)
            one_of(solver, "solver", SOLVERS)
            count = at_least_one(k, "k")
            options = Options(
                lam=as_number(lam, "lam"),
                max_exchanges=as_integer(max_exchanges, "max_exchanges"),
                n_candidates=at_least_one(n_candidates, "n_candidates"),
                solver=solver,
                reg=as_number(reg, "reg"),
                memory_budget=at_least_one(memory_budget, "memory_budget"),
                backend=backend,
                norm_scale="max",
                max_solves=None if max_solves is None else at_least_one(max_solves, "max_solves"),
                tol=as_number(tol, "tol"),
            )
            for name, value, least in (
                ("max_exchanges", options.max_exchanges, 0),
                ("lam", options.lam, 0),
                ("tol", options.tol, 0),
            ):
                if value < least:
                    raise ValueError(f"{name} must be >= {least}, got {value}")
            if options.reg <= 0:
                raise ValueError(f"reg must be > 0, got {reg}")
            pool = at_least_one(pool, "pool")
            if pool < count:
                raise ValueError(f"pool must be >= k={count}, got {pool}")
            x, y = as_shard(train_shard, "train_shard"), as_matrix(valid, "valid")
            if y.shape[1] != x.shape[1]:
                raise ValueError(
                    f"valid must have {x.shape[1]} columns as train_shard has, got shape {tuple(y.shape)}"
                )
            if y.device != x.device:
                raise ValueError(
                    f"valid is on device {y.device}, but train_shard on {x.device}; move one of them"
                )
            x, y = promoted(x, y)
            dtype = compute_dtype(x.dtype)
            x, y = x.detach().to(dtype), y.detach().to(dtype)
            if grad_norms is None:
                if options.lam:
                    raise ValueError(f"grad_norms must be given with lam={options.lam}, got None")
                norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            else:
                norms = as_vector(grad_norms, "grad_norms", x.device, integers=False, length=len(x))
            check_finite(x, "train_shard")
            check_finite(y, "valid")
            if len(norms):
                check_finite(norms, "grad_norms")
            if (norms < 0).any():
                place = int((norms < 0).nonzero()[0])
                raise ValueError(f"grad_norms must be >= 0, got {float(norms[place])} at position {place}")
            kernels = choose(backend, x.device)
            if solver == "exact" and not is_held(count, len(y), dtype):
                load_pot()
            told = {
                "k": count, "lam": options.lam, "max_exchanges": options.max_exchanges, "n_candidates": options.n_candidates, "tol": options.tol,
                "solver": solver, "reg": options.reg, "max_solves": options.max_solves, "pool": pool, "dtype": str(dtype),
                "rows of valid": len(y), "columns of train_shard": x.shape[1], "sum of valid": float(y.double().sum()),
                "memory_budget": options.memory_budget,
            }  # fmt: skip
            own = len(x), float(norms.max()) if len(norms) else 0.0
        except (TypeError, ValueError, RuntimeError, ImportError) as caught:
            error = caught
        parts = comm.agree(told, error, own)
        begin = time.perf_counter()
        counts, top = [part[0] for part in parts], max(part[1] for part in parts)
        n = sum(counts)
        starts = [sum(counts[:rank]) for rank in range(comm.world + 1)]
        if count > n:
            raise ValueError(f"k must be <= the {n} rows of train, got {count}")
        if options.lam > 0 and top == 0:
            raise ValueError(f"grad_norms must not be all 0 with lam > 0, got lam={options.lam}")
        exponent = exponent_into(top, (-1100, 500))
        penalty = torch.zeros_like(norms)
        if options.lam:
            penalty = options.lam * scale(norms, exponent) / times_power(top, exponent)
        costs = TransportCosts(x, y, penalty, kernels, options.memory_budget, most=comm.most)
        total = count + options.max_exchanges
        with Progress(progress if comm.rank == 0 else None, total, "goracs") as bar:
            cover = _SharedCover(
                comm, costs, Candidates(starts, comm.rank, torch.arange(len(x)) + starts[comm.rank]), n
            )
            picks, made = cover_picks(cover, n, count, bar.update)
            numbers = _gathered(comm, costs, picks, starts, pool)
            shared = SharedRows(comm, _Features(x), cover.candidates)
            rows = torch.cat([shared.fetch(numbers[i : i + 1024]) for i in range(0, len(numbers), 1024)])
            weights = _penalties(comm, penalty, cover.candidates, numbers)
            among = costs.of_items(rows, weights)
            at = {number: i for i, number in enumerate(numbers)}
            start = torch.tensor([at[j] for j in picks.tolist()], device=x.device)
            chosen, info = exchanged(among, start, made, options, bar.update, begin)
            # Every rank has solved the same problem; one whose processor rounds otherwise takes over what the first found.
            chosen = comm.broadcast(chosen, 0)
        indices = torch.tensor(numbers, device=x.device)[chosen]
        info |= {"cover": picks, "pool": len(numbers), "bytes": comm.bytes, "collectives": comm.collectives}
        return Coreset(indices, torch.full((count,), len(y) / count, dtype=dtype, device=x.device), info)


class _Features:
    """The rows of training items, to be sent."""

    by_all, clients = True, 0

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self.count, self.width = x.shape
        self.dtype, self.device = x.dtype, x.device

    def rows(self, candidates: Tensor) -> Tensor:
        return self._x[candidates]

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        return rows.new_empty(len(rows), 0)


class _Similarities:
    """Similarities of training items to all validation items, where each rank has those of its own."""

    by_all = False

    def __init__(self, costs: TransportCosts) -> None:
        self._costs = costs
        self.count, self.width = costs.shape
        self.clients = self.width
        self.dtype, self.device = costs.dtype, costs.penalty.device

    def rows(self, candidates: Tensor) -> Tensor:
        if not len(candidates):
            return torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        return self._costs.similarities(candidates)

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        return rows[:, clients]


class _SharedCover:
    """The greedy cover over all ranks; see `flashcoreset.methods.goracs.transport_costs.Cover`."""

    def __init__(self, comm: Communicator, costs: TransportCosts, candidates: Candidates, n: int) -> None:
        self._comm, self._costs, self._n, self.candidates = comm, costs, n, candidates
        source = _Similarities(costs)
        clients = costs.shape[1]
        top, self._nearest = torch.full((clients,), -1.0, dtype=source.dtype), torch.full((clients,), n)
        for rows, s in costs.blocks():
            most, first = s.cpu().max(0)
            first = torch.where(s.cpu() == most, torch.arange(len(s))[:, None], len(s)).amin(0)
            better = most > top
            self._nearest = torch.where(better, first + rows.start + int(candidates.first), self._nearest)
            top = torch.maximum(top, most)
        tops, firsts = comm.gather(top), comm.gather(self._nearest)
        best = tops.amax(0)
        self._nearest = torch.where(tops == best, firsts, n).amin(0)
        self._run = Greedy(
            comm, source, candidates, torch.ones(clients, dtype=torch.float64, device=source.device),
            power_of_gains(clients * max(0.0, float(best.max())), 1.0, source.dtype), 0.0, [], costs.memory_budget,
        )  # fmt: skip
        self.picks = self._run.picks
        self.complete = False

    @property
    def owner(self) -> Tensor:
        # The first pick serves everybody until a better one comes.
        return self._run.owner.clamp_min(0)

    @property
    def serving(self) -> list[int]:
        return self.owner.unique().tolist()

    def nearest_items(self) -> int:
        return len(self._nearest.unique())

    def extend(self, count: int) -> None:
        for _ in range(min(count, self._n - len(self.picks))):
            self._run.pick()
            position = len(self.picks) - 1
            if position and not bool((self._run.owner == position).any()):
                self.complete = True


def _gathered(
    comm: Communicator, costs: TransportCosts, picks: Tensor, starts: list[int], pool: int
) -> list[int]:
    """The numbers of the items that stage 2 chooses from, ascending."""
    n, first = starts[-1], starts[comm.rank]
    if n <= pool:
        return list(range(n))
    clients = costs.shape[1]
    each = max(1, (pool - len(picks)) // (clients * comm.world))
    top = torch.full((0, clients), 0.0, dtype=costs.dtype)
    which = torch.zeros(0, clients, dtype=torch.int64)
    for rows, s in costs.blocks():
        values = torch.cat([top, s.cpu()])
        numbers = torch.cat([which, torch.arange(rows.start, rows.stop)[:, None].expand(-1, clients)])
        order = torch.argsort(values, dim=0, descending=True, stable=True)[:each]
        top, which = values.gather(0, order), numbers.gather(0, order)
    here = which.unique() + first
    everyone = torch.cat([*comm.gather_rows(here), picks.cpu()])
    return everyone.unique().tolist()


def _penalties(comm: Communicator, penalty: Tensor, candidates: Candidates, numbers: list[int]) -> Tensor:
    """The penalties [r] of any items, on every rank."""
    found = torch.zeros(len(numbers), dtype=torch.int64, device=penalty.device)
    mine = [i for i, number in enumerate(numbers) if candidates.is_here(number)]
    places = candidates.places([numbers[i] for i in mine]).to(penalty.device)
    found[torch.tensor(mine, dtype=torch.int64, device=penalty.device)] = penalty[places].view(torch.int64)
    return comm.sum(found).view(torch.float64)
