"""`flashcoreset.compat.geomloss` against geomloss on the same input, and against the conditions of a solution where geomloss' annealing
leaves it."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch

from flashcoreset.compat.geomloss import SamplesLoss
from flashcoreset.compat.geomloss import ot as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geomloss
    import geomloss.ot as theirs

FINE = 0.9999  # scaling: marginals to 1e-6 of the mass


def sets(batch: int | None = None, mass: float | None = None) -> list[torch.Tensor]:
    """a, x, b, y in float64."""
    generator = torch.Generator().manual_seed(0)
    outer = () if batch is None else (batch,)
    x, y = (torch.randn(*outer, n, 2, dtype=torch.float64, generator=generator) for n in (11, 8))
    a, b = (torch.rand(*outer, n, dtype=torch.float64, generator=generator) + 0.1 for n in (11, 8))
    if mass is None:
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [a, x, b, y + 0.5]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_values(p, reach, debias, batch):
    options = {"p": p, "blur": 0.5, "reach": reach, "debias": debias}
    arguments = sets(batch, None if reach is None else 1.0)
    found = SamplesLoss("sinkhorn", scaling=FINE, **options)(*arguments)
    wanted = geomloss.SamplesLoss("sinkhorn", scaling=0.99, backend="tensorized", **options)(*arguments)
    assert found.shape == wanted.shape
    # What geomloss' annealing leaves at this scaling.
    assert torch.allclose(found, wanted, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_gradients_are_those_of_the_values(p, reach, debias):
    """Of geomloss 0.3.1 they are not if the marginals are relaxed: (reach^p + blur^p / 2) / (reach^p + blur^p) of them."""
    loss = SamplesLoss("sinkhorn", p=p, blur=0.7, reach=reach, debias=debias, scaling=1 - 1e-9)
    arguments = [t.requires_grad_() for t in sets(mass=None if reach is None else 1.0)]
    loss(*arguments).backward()
    generator = torch.Generator().manual_seed(1)
    for place, argument in enumerate(arguments):
        step = torch.randn(argument.shape, dtype=torch.float64, generator=generator)
        if reach is None and place in (0, 2):
            step = step - step.mean()  # sums of weights stay equal
        step = 1e-4 * step / step.norm()
        with torch.no_grad():
            ends = [
                loss(*(t + sign * step if i == place else t for i, t in enumerate(arguments)))
                for sign in (1, -1)
            ]
        assert float((argument.grad * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-4)


@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("p", [1, 2])
def test_potentials_solve_the_problem(p, reach):
    """The conditions of optimality, which geomloss' own potentials satisfy to a hundredth."""
    a, x, b, y = sets(mass=None if reach is None else 1.0)
    options = {"p": p, "blur": 0.7, "reach": reach, "scaling": FINE, "potentials": True}
    f, g = SamplesLoss("sinkhorn", debias=False, **options)(a, x, b, y)
    costs = torch.cdist(x, y) if p == 1 else torch.cdist(x, y) ** 2 / 2
    plan = a[:, None] * b * ((f[:, None] + g - costs) / 0.7**p).exp()
    asked_a, asked_b = (a, b) if reach is None else (a * (-f).exp(), b * (-g).exp())
    assert float((plan.sum(1) - asked_a).abs().sum()) < 1e-5
    assert float((plan.sum(0) - asked_b).abs().sum()) < 1e-5
    if reach is None:
        assert float((a * f).sum()) == pytest.approx(float((b * g).sum()))
    # Debiased: less the potentials of each set with itself, which are the same on both sides.
    F, G = SamplesLoss("sinkhorn", debias=True, **options)(a, x, b, y)
    for own, weight, points in ((f - F, a, x), (g - G, b, y)):
        costs = torch.cdist(points, points) if p == 1 else torch.cdist(points, points) ** 2 / 2
        plan = weight[:, None] * weight * ((own[:, None] + own - costs) / 0.7**p).exp()
        asked = weight if reach is None else weight * (-own).exp()
        assert float((plan.sum(1) - asked).abs().sum()) < 1e-5


def test_potentials_are_geomlosss_up_to_a_constant():
    arguments = sets()
    options = {"p": 1, "blur": 0.7, "potentials": True}
    for debias in (True, False):
        found = SamplesLoss("sinkhorn", scaling=FINE, debias=debias, **options)(*arguments)
        wanted = geomloss.SamplesLoss(
            "sinkhorn", scaling=0.995, debias=debias, backend="tensorized", **options
        )(*arguments)
        for mine, other in zip(found, wanted, strict=True):
            difference = mine - other.view_as(mine)
            assert float((difference - difference.mean()).abs().max()) < 0.01


@pytest.mark.parametrize("shape", ["[n]", "[n, 1]", "[B, n]", "[B, n, 1]", "uniform"])
def test_shapes_of_weights(shape):
    a, x, b, y = sets(2 if "B" in shape else None)
    if "1" in shape:
        a, b = a[..., None], b[..., None]
    arguments = (x, y) if shape == "uniform" else (a, x, b, y)
    value = SamplesLoss(p=1, blur=1.0)(*arguments)
    assert value.shape == ((2,) if "B" in shape else ())
    F, G = SamplesLoss(p=1, blur=1.0, potentials=True)(*arguments)
    assert (F.shape, G.shape) == ((a.shape, b.shape) if shape != "uniform" else ((11,), (8,)))
    labels = torch.zeros(11, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    if shape == "[n]":
        assert torch.equal(SamplesLoss(p=1, blur=1.0)(labels[0], a, x, labels[1], b, y), value)


@pytest.mark.parametrize("debias", [True, False])
def test_a_cost_function(debias):
    arguments = [t.requires_grad_() for t in sets(2)]
    options = {"blur": 0.7, "p": 2, "debias": debias, "scaling": FINE}
    plain = SamplesLoss(**options)(*arguments)
    given = SamplesLoss(cost=lambda x, y: ((x[:, :, None] - y[:, None]) ** 2).sum(3) / 2, **options)(
        *arguments
    )
    assert torch.allclose(plain, given, rtol=1e-6)
    grads = [torch.autograd.grad(loss.sum(), arguments) for loss in (plain, given)]
    for first, second in zip(*grads, strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["energy", "gaussian", "laplacian"])
@pytest.mark.parametrize("blocks", [False, True])
def test_kernel_losses(name, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("flashcoreset.compat.geomloss._kernel_losses._BLOCK", 40)
    results = []
    for module in (SamplesLoss, geomloss.SamplesLoss):
        arguments = [t.requires_grad_() for t in sets(2, 1.0)]
        value = module(name, blur=0.5, backend="tensorized")(*arguments)
        value.sum().backward()
        potentials = module(name, blur=0.5, backend="tensorized", potentials=True)(*arguments)
        results.append([value, *(t.grad for t in arguments), *potentials])
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)  # geomloss keeps distances above 1e-4


@pytest.mark.parametrize("library", ["numpy", "torch", "lists"])
@pytest.mark.parametrize(("unbalanced", "debias"), [(None, False), (None, True), (1.0, False), (1.0, True)])
def test_solve_sample(library, unbalanced, debias):
    a, x, b, y = sets(mass=None if unbalanced is None else 1.0)
    arrays = {"X_a": x, "X_b": y, "a": a, "b": b}
    if library != "torch":
        arrays = {k: v.numpy() if library == "numpy" else v.tolist() for k, v in arrays.items()}
    options = {"reg": 0.7, "unbalanced": unbalanced, "max_iter": 500, "debias": debias}
    found, wanted = ours.solve_sample(**arrays, **options), theirs.solve_sample(**arrays, **options)
    compare(found, wanted)
    assert type(found.plan) is type(wanted.plan)
    if debias:
        for name in ("potential_aa", "potential_bb"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=0.01)
    blur = ours.solve_sample(**arrays, blur=0.35**0.5, unbalanced=unbalanced, max_iter=500, debias=debias)
    np.testing.assert_allclose(blur.value, found.value, rtol=1e-6)


def compare(found, wanted) -> None:
    """To what geomloss' annealing leaves."""
    for name in ("value", "plan", "density", "marginal_a", "marginal_b"):
        mine, other = (np.asarray(getattr(r, name)) for r in (found, wanted))
        assert mine.shape == other.shape, name
        np.testing.assert_allclose(mine, other, rtol=0.02, atol=0.005, err_msg=name)
    potentials = [np.asarray(r.potential_a) for r in (found, wanted)]
    centered = [f - f.mean(-1, keepdims=True) for f in potentials]
    np.testing.assert_allclose(*centered, atol=0.01)
    for operator, matrix in (("plan_operator", "plan"), ("density_operator", "density")):
        linear, dense = getattr(found, operator), getattr(found, matrix)
        if dense.ndim == 3:
            continue
        vector, rows = (dense[0] * 0 + 1, dense[:, 0] * 0 + 2)
        np.testing.assert_allclose(linear @ vector, dense @ vector, rtol=1e-6)
        np.testing.assert_allclose(linear.T @ rows, dense.T @ rows, rtol=1e-6)
        assert linear.shape == dense.shape
        assert linear.transpose().shape == dense.T.shape


@pytest.mark.parametrize("unbalanced", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve(unbalanced, dtype):
    a, x, b, y = (t.to(dtype) for t in sets(2, None if unbalanced is None else 1.0))
    C = torch.cdist(x, y)
    options = {"reg": 0.7, "unbalanced": unbalanced, "max_iter": 500}
    found, wanted = ours.solve_batch(C, a=a, b=b, **options), theirs.solve_batch(C, a=a, b=b, **options)
    compare(found, wanted)
    assert found.value.dtype == found.potential_a.dtype == dtype
    vectors = torch.ones(2, 8, 3, dtype=dtype)
    assert torch.allclose(found.plan_operator @ vectors, found.plan @ vectors, rtol=1e-4)
    assert torch.allclose(
        found.density_operator.T @ a, (found.density.mT @ a[:, :, None])[:, :, 0], rtol=1e-4
    )
    one = ours.solve(C[1], a=a[1], b=b[1], **options)
    assert torch.allclose(one.plan, found.plan[1], rtol=1e-5)
    both = ours.solve_sample_batch(x, y, a, b, **options)
    assert torch.allclose(both.plan[0], ours.solve_sample(x[0], y[0], a[0], b[0], **options).plan, rtol=1e-5)


def test_gradients_of_results():
    a, x, b, y = sets()
    x.requires_grad_()
    result = ours.solve_sample(x, y, a, b, reg=0.7, max_iter=100)
    (of_value,) = torch.autograd.grad(result.value, x)
    moved = 1e-4 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    ends = [ours.solve_sample(x.detach() + s * moved, y, a, b, reg=0.7, max_iter=100) for s in (1, -1)]
    assert float((of_value * moved).sum()) == pytest.approx(
        float(ends[0].value - ends[1].value) / 2, rel=1e-3
    )
    weights = torch.linspace(0, 1, 88, dtype=x.dtype).view(11, 8) ** 2
    (of_plan,) = torch.autograd.grad((result.plan * weights).sum(), x)
    change = ((ends[0].plan - ends[1].plan) * weights).sum() / 2
    assert float((of_plan * moved).sum()) == pytest.approx(float(change), rel=1e-2)


def test_signatures_are_geomlosss():
    pairs = [(SamplesLoss, geomloss.SamplesLoss)]
    pairs += [
        (getattr(ours, n), getattr(theirs, n))
        for n in ("solve", "solve_batch", "solve_sample", "solve_sample_batch")
    ]
    for mine, other in pairs:
        wanted, found = (inspect.signature(f).parameters for f in (other, mine))
        assert list(found) == list(wanted)
        for name in set(wanted) - {"reg"}:  # in a batch geomloss has 0 for it, which it refuses
            assert (found[name].default, found[name].kind) == (wanted[name].default, wanted[name].kind)
    module = SamplesLoss("energy", blur=0.1, reach=2.0)
    for name, value in vars(geomloss.SamplesLoss("energy", blur=0.1, reach=2.0)).items():
        if not name.startswith("_") and name != "training":
            assert getattr(module, name) == value


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: SamplesLoss("hausdorff")(x, x),
            NotImplementedError,
            "loss='hausdorff' is not supported here; geomloss'",
        ),
        (lambda x: SamplesLoss("foo")(x, x), ValueError, "loss must be"),
        (lambda x: SamplesLoss(p=3)(x, x), NotImplementedError, "p=3"),
        (
            lambda x: SamplesLoss(cost="SqDist(X,Y)")(x, x),
            NotImplementedError,
            "cost='SqDist(X,Y)', a formula,",
        ),
        (lambda x: SamplesLoss("energy", kernel=abs)(x, x), NotImplementedError, "kernel"),
        (lambda x: SamplesLoss(backend="foo")(x, x), ValueError, "backend must be one of"),
        (lambda x: SamplesLoss(scaling=1.0)(x, x), ValueError, "scaling must be"),
        (lambda x: SamplesLoss()(x), ValueError, "SamplesLoss takes two arguments"),
        (lambda x: SamplesLoss()(x[0], x[0]), ValueError, "x and y must have shape"),
        (lambda x: SamplesLoss()(x, x[:, :1]), ValueError, "same batch size and number of features"),
        (lambda x: SamplesLoss()(x[:2, 0], x, x[:, 0], x), ValueError, "a must have shape (3,), got (2,)"),
        (
            lambda x: SamplesLoss(backend="online")(x, x[:, 0], x, None, x[:, 0], x),
            ValueError,
            "labels_x need backend",
        ),
        (lambda x: ours.solve_sample(x, x, reg=1.0), ValueError, "max_iter must be a positive integer"),
        (lambda x: ours.solve_sample(x, x, reg=0, max_iter=9), NotImplementedError, "reg=0"),
        (lambda x: ours.solve_sample(x, x, max_iter=9), ValueError, "reg must be > 0, got None"),
        (lambda x: ours.solve_sample(x, x, reg=1, max_iter=9, cost="foo"), NotImplementedError, "cost='foo'"),
        (lambda x: ours.solve_sample(x, x, reg=1, max_iter=9, tol=1.0), NotImplementedError, "tol"),
        (
            lambda x: ours.solve_sample(x, x, reg=1, max_iter=9, blur=1.0),
            ValueError,
            "reg and blur say the same",
        ),
        (
            lambda x: ours.solve_sample(x, x, reg=1, max_iter=9, method="foo"),
            NotImplementedError,
            "method='foo'",
        ),
        (lambda x: ours.solve_sample(x, x, a=-x[:, 0], reg=1, max_iter=9), ValueError, "a must be >= 0"),
        (lambda x: ours.solve(x, reg=1, max_iter=9, unbalanced=-1.0), ValueError, "unbalanced must be"),
        (
            lambda x: ours.solve(x, reg=1, max_iter=9, unbalanced_type="TV"),
            NotImplementedError,
            "unbalanced_type='TV'",
        ),
        (lambda x: ours.solve(x[0], reg=1, max_iter=9), ValueError, "C must have 2 dimensions"),
        (lambda x: ours.solve(x, reg=1, max_iter=9).potential_aa, ValueError, "with debias=True alone"),
        (
            lambda x: ours.solve_sample_batch(x[None], x[None], reg=1, p=1, max_iter=9),
            NotImplementedError,
            "p=1",
        ),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call(torch.arange(1.0, 7.0).view(3, 2))
    assert message in str(caught.value)
