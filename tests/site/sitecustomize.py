"""Python imports this at its start where PYTHONPATH names this folder: the command line of talas_phase1.py with the tests' tiny models."""

import sys
from pathlib import Path

if not any("multiprocessing" in argument for argument in sys.orig_argv):  # the processes that it starts segment nothing
    sys.path.append(str(Path(__file__).parents[1]))
    import tiny_models

    tiny_models.register_sam()
