"""Pictures of results; matplotlib is imported when one is drawn.

Each function takes a matplotlib Axes as `ax` (None makes a new figure) and returns it. Colours are those of Okabe and Ito, which differ with any
colour vision and in grey.
"""

from flashcoreset.plot.methods import descent, errors, losses, rounds, strata
from flashcoreset.plot.results import benchmarks
from flashcoreset.plot.selections import coverage, elbow, gains
from flashcoreset.plot.transports import interpolation, plan

__all__ = [
    "benchmarks",
    "coverage",
    "descent",
    "elbow",
    "errors",
    "gains",
    "interpolation",
    "losses",
    "plan",
    "rounds",
    "strata",
]
