"""``python -m flashcoreset``: the command line; under torchrun, and for features in several files, on all ranks together."""

import sys

from flashcoreset.cli import main
from flashcoreset.cli.ranks import is_for_ranks, run_on_ranks

sys.exit(run_on_ranks(sys.argv[1:]) if is_for_ranks(sys.argv[1:]) else main())
