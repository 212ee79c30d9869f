"""Rounds: when all clients are served as well as they can be, further picks serve them once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.results import Selection
from flashcoreset.facility_location.problem import Problem

# Gains are whole numbers of a unit that is at least 2^-1000: this lets all through but 0.
_ABOVE_ZERO = 2.0**-1022


def in_rounds(
    problem: Problem,
    rounds: int,
    k: int,
    stop_gain: float | None,
    solve_round: Callable[[Problem, int, int, float | None], Selection],
) -> Selection:
    """Up to `k` picks of one problem, round after round.

    Args:
        problem: the problem.
        rounds: how many rounds there may be, > 1.
        k: how many picks there may be.
        stop_gain: each round ends before the first gain below it; None for no limit.
        solve_round: solves a round's problem, given how many picks it may have, the number of those made before, and the gain
            below which the round ends.
    """
    least = _ABOVE_ZERO if stop_gain is None else max(stop_gain, _ABOVE_ZERO)
    parts: list[Selection] = []
    served: list[Tensor] = []
    made, given, is_last = 0, problem, False
    while (made < k and not is_last) or not parts:
        # The last round goes on with what gains nothing, as a run without rounds does.
        is_last = is_last or len(parts) == rounds - 1
        found = solve_round(given, k - made, made, stop_gain if is_last else least)
        count = found.indices.shape[0]
        if count == 0 and given.preselected is None and not is_last:
            is_last = True  # no candidate that is left serves anybody, so that the rounds that follow would be the same
            found = solve_round(given, k - made, made, stop_gain)
            count = found.indices.shape[0]
        if count > 0 or not parts:
            parts.append(found)
            served.append(torch.where(found.assignment >= 0, found.assignment + made, -1))
        made += count
        # What is preselected counts as picked in the first round.
        given = replace(problem, preselected=None, expected_picks=k - made)
    # Without a stop the first round has brought each client the best of all candidates.
    objective = parts[0].objective
    indices = torch.cat([part.indices for part in parts])
    if least > _ABOVE_ZERO and len(parts) > 1:
        kept = indices if problem.preselected is None else torch.cat([problem.preselected, indices])
        objective = solve_round(replace(problem, preselected=kept), 0, made, None).objective
    served_by = torch.stack(served)
    return replace(
        parts[0],
        objective=objective,
        indices=indices,
        gains=torch.cat([part.gains for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        rounds=_numbers([part.indices.shape[0] for part in parts], served_by.device),
        served_by=served_by,
    )


def _numbers(counts: list[int], device: torch.device) -> Tensor:
    """The round of each pick, from the rounds' `counts`."""
    return torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device)
    )
