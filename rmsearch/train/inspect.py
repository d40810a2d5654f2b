"""What is in a preference set, and what is wrong with it: ``python -m rmsearch.train.inspect``."""

from __future__ import annotations

if __name__ == "inspect":  # a file of this folder is run by its path, and the standard library's module is asked for
    import sys
    from pathlib import Path

    folder = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != folder]
    del sys.modules[__name__]
    __import__(__name__)  # Python takes what now stands in sys.modules
else:
    from rmsearch.cli import main
    from rmsearch.train.inspect_stage import InspectConfig, inspect

    __all__ = ["InspectConfig", "inspect"]

    if __name__ == "__main__":
        main(inspect)
