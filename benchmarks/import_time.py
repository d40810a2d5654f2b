"""How long importing rmsearch takes in a fresh interpreter, and which heavy modules come along.

python benchmarks/import_time.py [--json] [--runs 10]
The time is that of the import statement alone; starting the interpreter is measured on the first line for comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys

STATEMENTS = (
    "pass",
    "import rmsearch",
    "from rmsearch import Search",
    "import rmsearch.rmsearch",
    "import rmsearch.cli",
    "import rmsearch.doctor",
)
HEAVY = (
    "torch",
    "vllm",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "pandas",
    "pyarrow",
    "scipy",
    "boto3",
    "kfp",
    "fastapi",
    "numpy",
    "pydantic",
)
CODE = """
import json, sys, time
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


def measure(statement: str, runs: int) -> dict[str, object]:
    """Best and median seconds of a statement over fresh interpreters, and the heavy modules it loads."""
    times, heavy = [], []
    for _ in range(runs):
        code = CODE.format(statement=statement, heavy=HEAVY)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, heavy = json.loads(done.stdout)
        times.append(seconds)
    return {
        "statement": statement,
        "best_seconds": min(times),
        "median_seconds": statistics.median(times),
        "heavy": heavy,
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    measured = [measure(statement, arguments.runs) for statement in STATEMENTS]
    if arguments.json:
        print(json.dumps({"python": platform.python_version(), "runs": arguments.runs, "imports": measured}, indent=2))
        return
    print(f"Python {platform.python_version()}, {arguments.runs} runs each")
    print(f"{'statement':<30} {'best ms':>8} {'median ms':>10}  heavy modules")
    for each in measured:
        best, median = (1000 * float(str(each[name])) for name in ("best_seconds", "median_seconds"))
        print(f"{each['statement']:<30} {best:>8.1f} {median:>10.1f}  {', '.join(each['heavy']) or '-'}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
