"""python -m flashcoreset.cli"""

import sys

from flashcoreset.cli.ranks import run

sys.exit(run())
