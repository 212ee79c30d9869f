"""python -m flashcoreset_cli"""

import sys

from flashcoreset_cli import main

sys.exit(main())
