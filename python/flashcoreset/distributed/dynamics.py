"""The training dynamics that the ranks of a data-parallel training have gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from flashcoreset.distributed.communication import Communicator
from flashcoreset.scores.dynamics import TrainingDynamics


def merged(own: TrainingDynamics, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The state that the ranks' states make together, merged in their order; one rank's state is sent at a time."""
    with Communicator(group) as comm:
        state = own.state_dict()
        options = {"n_samples": own.n_samples, "el2n_epochs": own.el2n_epochs}
        epochs = comm.agree(options, None, state["epochs"])
        together = TrainingDynamics(own.n_samples, own.el2n_epochs)
        for rank in range(comm.world):
            theirs = dict(state) if rank == comm.rank else dict(TrainingDynamics(**options).state_dict())
            theirs["epochs"] = epochs[rank]
            if rank != comm.rank:
                theirs["records"] = torch.empty(len(epochs[rank]), own.n_samples, dtype=torch.uint8)
            for name in ("aum", "el2n", "correct", "forgotten", "records"):
                if theirs[name].numel():
                    theirs[name] = comm.broadcast(theirs[name], rank)
            other = TrainingDynamics(**options)
            other.load_state_dict(theirs)
            together.merge(other)
        return together.state_dict()
