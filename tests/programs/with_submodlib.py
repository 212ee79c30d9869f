"""Facility location by submodlib's documented calls: test_compat_programs.py runs it with and without flashcoreset.compat."""

import numpy as np
from submodlib import FacilityLocationFunction
from submodlib.functions.facilityLocationMutualInformation import FacilityLocationMutualInformationFunction
from submodlib.helper import create_kernel

rng = np.random.default_rng(0)
data = rng.standard_normal((60, 8)).astype(np.float32)
queries = rng.standard_normal((4, 8)).astype(np.float32)

for metric in ("cosine", "euclidean"):
    function = FacilityLocationFunction(n=60, mode="dense", data=data, metric=metric)
    for optimizer in ("NaiveGreedy", "LazyGreedy"):
        chosen = function.maximize(budget=6, optimizer=optimizer, stopIfZeroGain=False, show_progress=False)
        print(metric, optimizer, [(element, round(gain, 3)) for element, gain in chosen])
    print(round(function.evaluate({1, 5, 9}), 3), round(function.marginalGain({1, 5}, 9), 3))
    function.setMemoization({1, 5})
    print(round(function.marginalGainWithMemoization({1, 5}, 9), 3))

kernel = create_kernel(data, mode="sparse", metric="cosine", num_neigh=10)
function = FacilityLocationFunction(n=60, mode="sparse", sijs=kernel, num_neighbors=10)
print(function.maximize(budget=3, show_progress=False)[0][0])

function = FacilityLocationMutualInformationFunction(n=60, num_queries=4, data=data, queryData=queries)
print([element for element, _ in function.maximize(budget=3, show_progress=False)])
