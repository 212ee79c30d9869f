"""Random directions of zeroth-order gradients, made anew from a seed wherever they are needed."""

from flashcoreset.sketch.kinds import DIRECTION_STREAM as STREAM

__all__ = ["STREAM"]
