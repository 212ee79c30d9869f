"""Random directions of zeroth-order gradients, made anew from a seed wherever they are needed."""

from flashcoreset.sketch.kinds import KINDS

# The generator's stream, beside those of the random projections.
STREAM = len(KINDS)
