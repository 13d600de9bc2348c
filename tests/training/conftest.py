r"""Makes `trainings`, which the tests of this folder import, importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
