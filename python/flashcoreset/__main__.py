"""``python -m flashcoreset``: the command line; under torchrun, and for features in several files, on all ranks together."""

import sys

from flashcoreset.cli.ranks import run

sys.exit(run())
