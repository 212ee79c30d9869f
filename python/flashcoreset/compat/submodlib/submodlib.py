"""The names of `flashcoreset.compat.submodlib` once more, for programs that keep a copy of submodlib's repository and import from
`submodlib.submodlib`."""

from flashcoreset.compat.submodlib.functions import *  # noqa: F403
from flashcoreset.compat.submodlib.functions import __all__, __getattr__  # noqa: F401
