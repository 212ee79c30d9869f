"""What POT has and this package does not: functions that say so when they are called."""

from __future__ import annotations

from typing import Any

# The functions of POT for other problems than entropic transport, by module.
_OTHERS = {
    "ot": (
        "emd emd2 emd2_lazy emd_1d emd2_1d emd_1d_dual emd_1d_dual_backprop wasserstein_1d barycenter barycenter_unbalanced "
        "sinkhorn_lpl1_mm sliced_wasserstein_distance max_sliced_wasserstein_distance linear_sliced_wasserstein_sphere "
        "sliced_wasserstein_sphere sliced_wasserstein_sphere_unif min_sliced_transport_plan expected_sliced_plan uot_1d "
        "unbalanced_sliced_ot sliced_unbalanced_ot gromov_wasserstein gromov_wasserstein2 gromov_barycenters "
        "fused_gromov_wasserstein fused_gromov_wasserstein2 lowrank_gromov_wasserstein_samples weak_optimal_transport "
        "factored_optimal_transport solve_gromov solve_bary_sample solve_gromov_batch lowrank_sinkhorn binary_search_circle "
        "wasserstein_circle semidiscrete_wasserstein2_unif_circle linear_circular_ot compute_bspot_bijection merge_bijections "
        "tic toc toq"
    ),
    "ot.bregman": (
        "geometricBar geometricMean projR projC barycenter barycenter_sinkhorn free_support_sinkhorn_barycenter "
        "barycenter_stabilized barycenter_debiased jcpot_barycenter convolutional_barycenter2d "
        "convolutional_barycenter2d_debiased empirical_sinkhorn_nystroem empirical_sinkhorn_nystroem2 screenkhorn unmix"
    ),
    "ot.unbalanced": (
        "barycenter_unbalanced barycenter_unbalanced_sinkhorn barycenter_unbalanced_stabilized mm_unbalanced mm_unbalanced2 "
        "lbfgsb_unbalanced lbfgsb_unbalanced2 uot_1d sliced_unbalanced_ot unbalanced_sliced_ot"
    ),
    "ot.batch": (
        "solve_gromov_batch loss_quadratic_batch loss_quadratic_samples_batch tensor_batch proximal_bregman_log_plan_batch"
    ),
}


def refused(module: str, name: str) -> Any:
    """A function that refuses to run, for the function `name` of POT's counterpart of `module`.

    Raises:
        AttributeError: if POT has no such function.
    """
    peer = module.removeprefix("flashcoreset.compat.")
    if name not in _OTHERS[peer].split():
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{peer}.{name} is no entropic transport and not part of {module}; POT's {peer}.{name} computes it"
        )

    function.__name__ = function.__qualname__ = name
    return function
