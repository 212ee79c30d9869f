"""Low-level calls: each backend's kernels with caller-owned outputs, and runs that the caller advances pick
by pick.

`kernels.cpu` is compiled, `kernels.torch` is the plain PyTorch reference; both have the same names.
`kernels.cuda` and `flashcoreset.kernels.triton` (imported separately, since it imports triton) have the same names
except where the list says otherwise:

    pairwise(x, y=None, *, metric, out=None)
    FacilityLocation(FacilityLocationProblem(x, clients, metric, weights, preselected, costs, offset, memory_budget))
        .step(count, naive=False), .pick(naive, stop_gain), .step_among(candidates), .close(candidates),
        .finish(indices, gains, weights, assignment)
    sinkhorn(SinkhornProblem(x, y, a, b, reg, metric, ...)), sinkhorn_apply(problem, v, transpose=False), sinkhorn_plan(problem)
    sketch(x, dim, *, kind, seed, offset, nnz, out=None), projection_matrix(rows, dim, *, kind, seed, ...)
    sketch_csr(csr, dim, *, kind, seed, ...)    (in `kernels.cpu` and `kernels.torch`)
    sample_scores(logits, targets, *, masked=False, out=None)    (not in `kernels.cuda`)
    directions(out, *, seed, begin, first=0)
    top_updates(UpdatesProblem(Gradients(values, seed, length), history, member, offset, top)),
        update_history(Gradients(values, ...), history, chosen)
    caratheodory(CaratheodoryProblem(x, weights, max_size), out=None)
    orthogonal_matching_pursuit(PursuitProblem(g, target, k, nonnegative, ridge, memory_budget)), frank_wolfe(...)
    NearestOrder(centroids) or NearestOrder.of_similarities(lists, dtype)
        .begin(length), .update(x) or .update_similarities(s), .finish(), .rounds(count, k), .order(i), .taken
        (in neither)

A FacilityLocation is its own workspace: it keeps the packed points, bounds and lists between calls, so that
further picks cost nothing but their own work. Arguments are tensors whose types, shapes and indices are taken as they
are; the public functions check them first.

Example:
    >>> import torch
    >>> from flashcoreset import kernels
    >>> kernels.torch.pairwise(torch.eye(2), metric="l1", out=torch.empty(2, 2))
    tensor([[0., 2.],
            [2., 0.]])
"""

from flashcoreset.caratheodory.problem import Problem as CaratheodoryProblem
from flashcoreset.facility_location.problem import Problem as FacilityLocationProblem
from flashcoreset.kernels import cpu, cuda, torch
from flashcoreset.matching.problem import Gradients
from flashcoreset.matching.problem import Updates as UpdatesProblem
from flashcoreset.pursuit.problem import Problem as PursuitProblem
from flashcoreset.sinkhorn.problem import Problem as SinkhornProblem

__all__ = [
    "CaratheodoryProblem",
    "FacilityLocationProblem",
    "Gradients",
    "PursuitProblem",
    "SinkhornProblem",
    "UpdatesProblem",
    "cpu",
    "cuda",
    "torch",
]
