#!/usr/bin/env bash
# The table of examples/README.md with one command: chain.sh on MetaTool and on SciFact, whose 809 training claims are too few
# for a new head, so that its base is first trained on general pairs and on the corpus's own titles and sentences.
#   bash examples/chains.sh DATA OUTPUT_FOLDER           (DATA holds metatool/, scifact/, medquad/ and squad_nqg/)
# Run again, finished stages are skipped.
set -euo pipefail
data=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
export DTYPE=bfloat16 # of the rerankers: quicker on CPUs that have it
NEGATIVES=2 bash "$here/chain.sh" "$data/metatool" "$out/metatool"
bash "$here/../benchmarks/scifact_base.sh" "$data" "$out/scifact_base"
NEGATIVES=8 RATE=5e-4 bash "$here/chain.sh" "$data/scifact" "$out/scifact" "$out/scifact_base/stage1"

python - "$out" <<'PY'
import json, sys
from pathlib import Path
print("\n| data set | embedding | judge: labels | p | judge: reward teacher | p | pairs trained on |\n|---|---|---|---|---|---|---|")
for folder in (Path(sys.argv[1]) / name for name in ("metatool", "scifact")):
    measured = json.loads((folder / "metrics.json").read_text())
    cells = [f"{folder.name}, {measured['queries']} test queries", f"{measured['runs']['embed']['means']['nDCG@10']:.4f}"]
    for judge in ("labels", "teacher"):
        run = measured["runs"][judge]
        cells += [f"{run['means']['nDCG@10']:.4f}", f"{run['comparison']['nDCG@10']['p_holm']:.2g}"]
    pairs = [sum(1 for _ in (folder / f"{judge}_train.jsonl").open()) for judge in ("labels", "teacher")]
    print(f"| {' | '.join(cells)} | {pairs[0]:,}, {pairs[1]:,} |")
PY
