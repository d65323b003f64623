"""Lets these tests build pairs of models as the parity tests do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))
