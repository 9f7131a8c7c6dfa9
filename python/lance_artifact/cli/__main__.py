"""``python -m lance_artifact.cli``."""

import sys

from . import main

sys.exit(main())
