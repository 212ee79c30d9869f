"""Random projections of rows that are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.tensor import as_dense, compute_dtype
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.selection import as_shard
from flashcoreset.sketch import sketch as of_rows


def sketch(
    x_shard: Any,
    dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    offset: int = 0,
    nnz: int = 1,
    gather: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """`fc.sketch` of all ranks' rows: each rank projects its own, by the same matrix.

    Args:
        x_shard: [B of this rank, D]; a rank may have no rows.
        dim, kind, seed, offset, nnz, backend: as in `fc.sketch`, the same on every rank.
        gather: whether every rank gets the sketches of all; False gives each rank those of its rows, and nothing is sent but the
            options, which are compared.
        group: the process group; None is the default one.

    Returns:
        [B of all ranks, dim], rank after rank, or with gather=False [B of this rank, dim]: the bits of `fc.sketch`.

    Raises:
        TypeError, ValueError: as `fc.sketch` does, on every rank, and for options that differ, naming the rank.
        RankError: if a rank ends or hangs.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.arange(12.0).reshape(3, 4)
        >>> torch.equal(fc.distributed.sketch(x, 2, kind="sjlt"), fc.sketch(x, 2, kind="sjlt"))
        True
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        options: dict[str, Any] = {}
        try:
            if not isinstance(gather, bool):
                raise TypeError(f"gather must be True or False, got {type(gather).__name__}")
            x = as_shard(x_shard, "x_shard")
            # Without rows there is nothing to project, but the options are checked all the same.
            some = x if len(x) else x.new_zeros(1, x.shape[1])
            own = of_rows(some, dim, kind=kind, seed=seed, offset=offset, nnz=nnz, backend=backend)
            own = own[: len(x)]
            options = {
                "columns of x_shard": x.shape[1], "dtype": str(compute_dtype(x.dtype)), "dim": dim, "kind": kind, "seed": seed,
                "offset": offset, "nnz": nnz, "gather": gather,
            }  # fmt: skip
        except (TypeError, ValueError, RuntimeError) as caught:
            error = caught
        comm.agree(options, error)
        return torch.cat(comm.gather_rows(own)) if gather else own


def gather_rows(rows_shard: Any, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks, rank after rank, on every rank: for what each rank has made of its own samples, such as
    `GradientSketcher.sketches` and `.norms` in data-parallel training, where all ranks project by the same matrix.

    Args:
        rows_shard: [B of this rank, ...], of one dtype and, but for the first dimension, one shape on all ranks; a rank may have no rows.
        group: the process group; None is the default one.

    Returns:
        [B of all ranks, ...] on the device of `rows_shard`.

    Raises:
        TypeError, ValueError: for what is no tensor or array of that kind, on every rank, naming the rank.
        RankError: if a rank ends or hangs.

    Example:
        >>> import torch, flashcoreset as fc
        >>> fc.distributed.gather_rows(torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        options: dict[str, Any] = {}
        try:
            rows = as_dense(rows_shard, "rows_shard")
            if rows.dim() == 0:
                raise ValueError("rows_shard must have at least 1 dimension, got a single number")
            options = {"dtype": str(rows.dtype), "shape of a row": tuple(rows.shape[1:])}
        except (TypeError, ValueError) as caught:
            error = caught
        comm.agree(options, error)
        return torch.cat(comm.gather_rows(rows.detach()))
