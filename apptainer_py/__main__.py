"""`python3 -m apptainer_py`, for a tree that is not installed."""

from __future__ import annotations

import sys

from apptainer_py.cli.main import main

sys.exit(main(sys.argv))
