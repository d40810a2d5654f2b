#!/usr/bin/env bash
# SciFact: the abstracts that bear on a claim, reranking the embedding's top 100. Trains on what is in DATA alone: first
# scifact_base.sh, then the training claims. No test claim and no test label is used before the last two commands.
#   bash benchmarks/scifact.sh DATA OUTPUT_FOLDER        (DATA holds scifact/, medquad/ and squad_nqg/)
set -euo pipefail
source "$(dirname "$0")/scifact_base.sh" # stage 1; data, out, set_, lora and dev are its
for split in fit test; do
  rmsearch evaluation bm25 --dataset-path "$set_" --split $split --top-k 100 \
    --output "$out/bm25_$split.json" --output-eval "$out/bm25_${split}_eval.json"
done

# Stage 2: the 659 training claims against abstracts that both first stages rank high
rmsearch train mine --dataset-path "$set_" --split fit --runs "$out/embed_fit.json" --runs "$out/bm25_fit.json" --positives 5000 \
  --negatives-per-positive 1 --rank-max 100 --random-share 0 --margin-scale 8 --output "$out/claims.jsonl"
rmsearch train lora --model-name "$out/stage1" --output-dir "$out/model" --max-length 256 --learning-rate 5e-4 --evaluation-steps 80 \
  --dataset-list-train "$out/claims.jsonl" "${lora[@]}" "${dev[@]}"

rmsearch evaluation rerank --dataset-path "$set_" --embed-output "$out/embed_test.json" --model-name "$out/model" --dtype bfloat16 \
  --output "$out/rerank.json" --output-eval "$out/rerank_eval.json" \
  --fuse zscore --fuse-fit "$out/embed_dev.json" --fuse-fit-split dev --output-fused "$out/fused_eval.json"
rmsearch evaluation ndcg --dataset-path "$set_" --run embed="$out/embed_test_eval.json" --run bm25="$out/bm25_test_eval.json" \
  --run reward="$out/rerank_eval.json" --run fused="$out/fused_eval.json" --baseline embed --output "$out/metrics.json"
