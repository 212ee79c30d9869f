"""Random directions of zeroth-order gradients, made anew from a seed wherever they are needed."""

from flashcoreset.sketch.kinds import KINDS

# The number of the generator's stream, after those of the random projections.
STREAM = len(KINDS)
