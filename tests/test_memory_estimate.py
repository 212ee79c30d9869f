"""memory_estimate against the peak of the process around the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processes import run

import flashcoreset as fc

# Measured in a process of its own, after a small call has loaded and started everything. Only anonymous memory counts: pages of
# libraries come and go with the system's mood.
MEASURE = """
import threading, time, torch, flashcoreset as fc

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
fc.facility_location(torch.randn(64, 8, generator=g, dtype={dtype}), 2, **{small})
torch.ones(1 << 20, dtype=torch.float16).float()  # starts torch's own threads
tensors = [torch.randn(*shape, generator=g, dtype={dtype}) for shape in {shapes}]
tensors[0] = tensors[0].mT if {transposed} else tensors[0]
clients = {{"clients": tensors[1]}} if len(tensors) > 1 else {{}}
done, peak = threading.Event(), 0
watcher = threading.Thread(target=watch)
watcher.start()
time.sleep(0.05)  # its stack and its part of the heap are not the call's
before = anonymous()
fc.facility_location(tensors[0], {k}, **clients, **{options})
done.set()
watcher.join()
print(peak - before)
print(fc.memory_estimate("facility_location", *tensors, k={k}, dtype={dtype}, **{options}))
"""

CASES = {
    "points": ([(15_000, 256)], 20, "torch.float32", {"memory_budget": 0}),
    "points float64": ([(12_000, 128)], 5, "torch.float64", {"memory_budget": 0}),
    "matrix kept": ([(6_000, 32)], 200, "torch.float32", {"memory_budget": 160 * 2**20}),
    "clients": ([(2_000, 64), (100_000, 64)], 10, "torch.float32", {"memory_budget": 0}),
    "half": ([(12_000, 256)], 5, "torch.float16", {"memory_budget": 0}),
    "matrix": (
        [(6_000, 6_000)],
        5,
        "torch.float32",
        {"metric": "precomputed", "memory_budget": 0, "groups": [0, 1] * 3_000},
    ),
    "transposed": ([(6_000, 5_000)], 5, "torch.float32", {"metric": "precomputed", "memory_budget": 0}),
    "reference": ([(4_000, 16)], 5, "torch.float32", {"backend": "torch", "memory_budget": 64 * 2**20}),
}


@pytest.mark.parametrize("name", CASES)
def test_is_an_upper_bound_within_a_factor_of_two(name: str) -> None:
    shapes, k, dtype, options = CASES[name]
    small = {key: value for key, value in options.items() if key not in ("groups", "metric")}
    code = MEASURE.format(
        shapes=shapes, k=k, dtype=dtype, options=options, small=small, transposed=name == "transposed"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    measured, estimate = map(int, result.stdout.split())
    assert measured <= estimate + 2**20  # the allocator's own pages
    assert estimate <= 2 * measured, (measured, estimate)


def test_takes_the_function_or_its_name_and_shapes_or_tensors() -> None:
    estimate = fc.memory_estimate(fc.facility_location, (1000, 16), k=10)
    assert estimate == fc.memory_estimate("facility_location", torch.empty(1000, 16), k=10)
    assert estimate < fc.memory_estimate(fc.facility_location, (1000, 16), (5000, 16), k=10)
    assert fc.memory_estimate(fc.facility_location, (1000, 16), (50, 16), k=10) == fc.memory_estimate(
        fc.facility_location, (1000, 16), clients=(50, 16), k=10
    )
    double = fc.memory_estimate(fc.facility_location, (np.int64(1000), 16), k=10, dtype=torch.float64)
    assert estimate < double
    for dtype in ("float64", np.float64, np.dtype("float64")):
        assert double == fc.memory_estimate(fc.facility_location, (1000, 16), k=10, dtype=dtype)


def test_takes_gradients_and_histories_without_values() -> None:
    m = torch.empty(655_360, device="meta")
    g = fc.LowRankGradients(torch.zeros(128, 1), seed=0, numel=655_360)
    labels = torch.arange(128) % 4
    streamed = fc.memory_estimate(
        fc.match_gradients, g, 64, normalize=fc.AdamState(m, m, 1), top=2560, groups=labels
    )
    assert streamed <= 32e6 + 8 * 655_360  # and the new history
    rank_one = fc.memory_estimate(
        fc.match_gradients, g, 64, normalize=fc.RankOneAdamState(655_360), top=2560, groups=(128,)
    )
    assert streamed < rank_one < 3 * streamed
    for backend in ("cuda", "triton", "torch"):
        assert fc.memory_estimate(fc.match_gradients, (128, 1000), 64, method="omp", backend=backend) > 2**15


def test_reductions_on_a_device_copy_no_rows() -> None:
    for backend in ("cuda", "triton"):
        rounds = fc.memory_estimate(fc.caratheodory, (10_000_000, 32), backend=backend)
        sampled = fc.memory_estimate(fc.caratheodory, (10_000_000, 32), max_size=1_000, backend=backend)
        assert 16 * 10_000_000 / 4 < rounds < 4 * 32 * 10_000_000 / 20
        assert 8 * 10_000_000 < sampled < 4 * 32 * 10_000_000 / 10  # one weight per row


def test_scale_promised_for_a_hundred_thousand_points() -> None:
    assert fc.memory_estimate(fc.facility_location, (100_000, 128), k=1000) < 2**30
    assert fc.memory_estimate(fc.facility_location, (1_000_000, 64), (10_000, 64), k=1000) < 2**30


@pytest.mark.parametrize(
    ("arguments", "kw", "error", "words"),
    [
        (("no_such", (3, 3)), {}, TypeError, "fn must be one of .*facility_location.*no_such"),
        ((fc.facility_location, (3,)), {}, ValueError, r"x must have 2 dimensions.*\(3,\)"),
        ((fc.facility_location, (0, 3)), {}, ValueError, r"x .*\(0, 3\)"),
        ((fc.facility_location, 3.5), {}, TypeError, "x must be a shape.*3.5"),
        ((fc.facility_location, (3, 3), (3, 4)), {}, ValueError, r"clients .*\(3, 4\)"),
        ((fc.facility_location, (3, 3)), {"metric": "cosin"}, ValueError, "metric 'cosin'"),
        ((fc.facility_location, (3, 3)), {"method": "greedy"}, ValueError, "method 'greedy'"),
        ((fc.facility_location, (3, 3)), {"memory_limit": 5}, TypeError, "facility_location.*memory_limit"),
        ((fc.facility_location, (3, 3)), {"memory_budget": -5}, ValueError, "memory_budget .*-5"),
        ((fc.facility_location, (3, 3)), {"k": 4}, ValueError, "k must be between 1 and 3, .* got 4"),
        ((fc.facility_location, (3, 3)), {"dtype": torch.int32}, TypeError, "dtype .*int32"),
        ((fc.simcore, (9, 3), (2, 3)), {"k": 0}, ValueError, "k must be >= 1, got 0"),
        ((fc.simcore, (9, 3), (2, 3)), {"n_clusters": -3}, ValueError, "n_clusters .*-3"),
        ((fc.simcore, (9, 3), (2, 3)), {"backend": "fast"}, ValueError, "backend 'fast'"),
        ((fc.sketch, (9, 3), 0), {}, ValueError, r"dim must be in \[1, 2\^31\], got 0"),
        ((fc.sketch, (9, 3), 4), {"kind": "dense"}, ValueError, "unknown kind 'dense'"),
        ((fc.sketch, (9, 3), 4), {"nnz": 5}, ValueError, "nnz must be in"),
        ((fc.projection_matrix, 0, 4), {}, ValueError, "D must be at least 1, got 0"),
        ((fc.sample_scores, (9,)), {}, ValueError, r"logits must have 2 dimensions.*\(9,\)"),
        ((fc.sample_scores, (9, 3), (8,)), {}, ValueError, r"targets must have shape \(9,\).*got \(8,\)"),
        ((fc.ccs, (9,), 10), {}, ValueError, "k must be <= the 9 samples, got 10"),
        ((fc.ccs, (9,), 3), {"groups": (8,)}, ValueError, r"groups must have shape \[9\], got \(8,\)"),
        ((fc.ccs, (9,), 3), {"n_strata": 0}, ValueError, "n_strata must be >= 1, got 0"),
        ((fc.match_gradients, (9, 3), 10), {}, ValueError, "k must be between 1 and 9, the rows of g, got 10"),
        ((fc.match_gradients, (9, 3), 2), {"top": 4}, ValueError, r"top must be in \[1, 3\]"),
        ((fc.match_gradients, (9, 3), 2), {"normalize": (3,)}, TypeError, "normalize must be an AdamState, got tuple"),
        (
            (fc.match_gradients, (9, 3), 2), {"normalize": fc.RankOneAdamState(4)}, ValueError,
            "normalize must be of gradients of length 3, got one of length 4",
        ),
        ((fc.match_gradients, (9, 3), 2), {"groups": (8,)}, ValueError, r"groups must have shape \[9\], got \(8,\)"),
        ((fc.caratheodory, (9,)), {}, ValueError, r"x must have 2 dimensions.*\(9,\)"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple, kw: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fc.memory_estimate(*arguments, **kw)


MEASURE_SINKHORN = (
    MEASURE.split("torch.set_num_threads")[0]
    + """
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
fc.sinkhorn(torch.rand(64, 8, generator=g), torch.rand(64, 8, generator=g), reg=1.0, tol=0, max_iter=2, backend={backend})
tensors = [torch.rand(*shape, generator=g, dtype={dtype}) for shape in {shapes}]
done, peak = threading.Event(), 0
watcher = threading.Thread(target=watch)
before = anonymous()
watcher.start()
fc.sinkhorn(*tensors, reg=2.0, tol=0, max_iter=2, **{options})
done.set()
watcher.join()
print(peak - before)
print(fc.memory_estimate("sinkhorn", *tensors, reg=2.0, tol=0, max_iter=2, dtype={dtype}, **{options}))
"""
)

SINKHORN = {
    "points, matrix kept": ([(4_000, 16), (5_000, 16)], "torch.float32", {}),
    "points, float64, matrix kept": ([(4_000, 16), (3_000, 16)], "torch.float64", {}),
    "points, streamed": ([(30_000, 256), (20_000, 256)], "torch.float32", {"memory_budget": 0}),
    "costs": ([(5_000, 6_000)], "torch.float32", {"metric": "precomputed"}),
    "batch": ([(40, 1_500, 8), (40, 1_500, 8)], "torch.float32", {}),
    "reference": ([(2_000, 8), (2_000, 8)], "torch.float32", {"backend": "torch"}),
}


@pytest.mark.parametrize("name", SINKHORN)
def test_of_sinkhorn_is_an_upper_bound_within_a_factor_of_two(name: str) -> None:
    shapes, dtype, options = SINKHORN[name]
    code = MEASURE_SINKHORN.format(
        shapes=shapes, dtype=dtype, options=options, backend=repr(options.get("backend"))
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    measured, estimate = map(int, result.stdout.split())
    assert measured <= estimate + 2**20  # the allocator's own pages
    assert estimate <= 2 * measured, (measured, estimate)


# The kernel's own record of the peak: NumPy holds the interpreter when a thread would have to measure.
MEASURE_HIGHEST = """
import torch, flashcoreset as fc

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(2)
torch.ones(1 << 20, dtype=torch.float16).float()  # starts torch's own threads
g = torch.Generator().manual_seed(0)
{prepare}
call(*large)  # whose code is in memory from here on
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
before = resident()
call(*large)
print(resident() - before)
print(fc.memory_estimate({name!r}, *large, {dtype}**options))
"""
SKETCHED = """
x = torch.randn(*{shape}, generator=g, dtype={dtype})
large, options = (x, {dim}), dict({options})
call = lambda x, dim: fc.sketch(x, dim, **options)
"""
MADE = """
large, options = (20_000, 1_000), dict({options})
call = lambda rows, dim: fc.projection_matrix(rows, dim, **options)
"""
SCORED = """
x = torch.randn(*{shape}, generator=g, dtype={dtype})
targets = torch.zeros(x.shape[:-1], dtype=torch.int64)
large, options = (x, targets, {mask}), dict({options})
call = lambda *values: fc.sample_scores(*values, **options)
"""
DRAWN = """
s = torch.rand(4_000_000, generator=g, dtype={dtype})
large, options = (s, {k}), dict({options})
call = lambda s, k: fc.ccs(s, k, **{{key: getattr(value, "__getitem__", lambda _: value)(slice(len(s))) for key, value in options.items()}})
"""
MATCHED = """
x, state = torch.randn(*{shape}, generator=g, dtype={dtype}), None
x = fc.LowRankGradients(x, seed=1, numel={length}) if {length} else x
if {adam}:
    m = torch.zeros({length} or x.shape[1])
    state = fc.AdamState(m, m + 1, 3)
large, options = (x, {k}), dict(normalize=state, {options})
call = lambda x, k: fc.match_gradients(x, k, **options)
"""
REDUCED = """
x = torch.randn(*{shape}, generator=g, dtype={dtype})
large, options = (x,), dict({options})
call = lambda x: fc.caratheodory(x, **options)
"""
HIGHEST = {
    "sketch": ("sketch", SKETCHED, {"shape": (512, 3_000), "dim": 20_000}),
    "sketch gaussian": ("sketch", SKETCHED, {"shape": (512, 3_000), "dim": 20_000, "options": "kind='gaussian'"}),
    "sketch sjlt": ("sketch", SKETCHED, {"shape": (512, 3_000), "dim": 20_000, "options": "kind='sjlt', nnz=3"}),
    "sketch srht float64": (
        "sketch", SKETCHED,
        {"shape": (2_000, 30_000), "dim": 1_000, "dtype": "torch.float64", "options": "kind='srht'"},
    ),
    "sketch long": ("sketch", SKETCHED, {"shape": (2, 3), "dim": 2**23, "options": "kind='sjlt'"}),
    "sketch half": ("sketch", SKETCHED, {"shape": (4, 12_000_000), "dim": 64, "dtype": "torch.float16"}),
    "sketch reference": (
        "sketch", SKETCHED, {"shape": (8, 100_000), "dim": 512, "options": "kind='gaussian', backend='torch'"},
    ),
    "matrix": ("projection_matrix", MADE, {}),
    "matrix half": ("projection_matrix", MADE, {"options": "dtype=torch.bfloat16, kind='sjlt'"}),
    "matrix reference": ("projection_matrix", MADE, {"options": "kind='srht', backend='torch'"}),
    "scores": ("sample_scores", SCORED, {"shape": (2_000_000, 10)}),
    "scores of tokens": ("sample_scores", SCORED, {"shape": (50_000, 40, 5), "dtype": "torch.bfloat16"}),
    "scores masked": (
        "sample_scores", SCORED, {"shape": (50_000, 40, 5), "mask": "torch.ones(50_000, 40, dtype=torch.bool)"},
    ),
    "scores reference": (
        "sample_scores", SCORED, {"shape": (20_000, 200), "dtype": "torch.float64", "options": "backend='torch'"},
    ),
    "ccs": ("ccs", DRAWN, {}),
    "ccs all": ("ccs", DRAWN, {"k": "len(s)", "dtype": "torch.float64"}),
    "ccs quantile": ("ccs", DRAWN, {"options": "strata='quantile'"}),
    "ccs log": ("ccs", DRAWN, {"options": "strata='log'"}),
    "ccs mislabelled, groups": (
        "ccs", DRAWN, {"options": "mislabel_scores=s, mislabel_ratio=0.1, groups=torch.arange(len(s)) % 7"},
    ),
    "matching streamed": (
        "match_gradients", MATCHED,
        {"shape": (64, 1), "length": 2_000_000, "adam": True, "options": "top=2_000, groups=torch.arange(64) % 4"},
    ),
    "matching of half rows": (
        "match_gradients", MATCHED,
        {"shape": (500, 40_000), "adam": True, "dtype": "torch.float16", "options": "top=20_000"},
    ),
    "matching of all dimensions": ("match_gradients", MATCHED, {"shape": (1_500, 3_000), "adam": True}),
    "matching pursuit": ("match_gradients", MATCHED, {"shape": (2_000, 20_000), "k": 900, "options": "method='omp'"}),
    "matching pursuit of groups": (
        "match_gradients", MATCHED,
        {"shape": (1_000, 20_000), "k": 500, "options": "method='omp', groups=torch.arange(1_000) % 2"},
    ),
    "matching pursuit of updates": (
        "match_gradients", MATCHED, {"shape": (1_000, 5_000), "k": 500, "adam": True, "options": "method='omp'"},
    ),
    "Frank-Wolfe of half rows": (
        "match_gradients", MATCHED,
        {"shape": (2_000, 10_000), "k": 900, "dtype": "torch.bfloat16", "options": "method='frank_wolfe'"},
    ),
    "matching reference": (
        "match_gradients", MATCHED, {"shape": (200, 100_000), "adam": True, "options": "top=1_000, backend='torch'"},
    ),
    "caratheodory": ("caratheodory", REDUCED, {"shape": (500_000, 8)}),
    "caratheodory, wide": ("caratheodory", REDUCED, {"shape": (3_000, 700), "options": "max_size=1_500"}),
    "caratheodory, wider than long": ("caratheodory", REDUCED, {"shape": (400, 3_000)}),
    "caratheodory reference": (
        "caratheodory", REDUCED, {"shape": (50_000, 8), "options": "backend='torch'"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIGHEST)
def test_of_others_is_an_upper_bound_within_a_factor_of_two(name: str) -> None:
    function, template, case = HIGHEST[name]
    case = {
        "dtype": "torch.float32", "options": "", "mask": None, "k": 30 if template is MATCHED else 400_000,
        "adam": False, "length": None, **case,
    }  # fmt: skip
    dtype = "" if template is MADE else f"dtype={case['dtype']}, "
    code = MEASURE_HIGHEST.format(prepare=template.format(**case), name=function, dtype=dtype)
    # glibc's malloc raises the size from which blocks are given back at once, by what was freed before; here it stays.
    result = run(code, start={"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert result.returncode == 0, result.stderr
    measured, estimate = map(int, result.stdout.split())
    assert measured <= estimate + 2**20  # the allocator's own pages
    assert estimate <= 2 * measured, (measured, estimate)
