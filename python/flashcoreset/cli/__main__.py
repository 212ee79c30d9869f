"""python -m flashcoreset.cli"""

import sys

from flashcoreset.cli import main

sys.exit(main())
