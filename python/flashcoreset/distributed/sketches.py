"""Random projections of rows that are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.tensor import compute_dtype
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
