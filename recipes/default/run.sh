#!/usr/bin/env bash
# The default model, from the untrained one to an adapter to ship:
#   prepare -> train sft -> bootstrap -> train sft (reasoning) -> train rl -> average -> eval -> package -> report
#
#   recipes/default/run.sh --data data --output runs/default --budget tiny|cpu|gpu
#
# tiny: three training sets, a few small steps: under half an hour on two cores; shows that all of it works.
# cpu: the shipped recipe's sizes, hours on two cores with native bfloat16.   gpu: one GPU.
# Interrupted, the same command goes on. Every stage leaves its result in --output; remove one to do it again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=data output=runs/default budget=cpu
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    --budget) budget=$2; shift 2 ;;
    *) sed -n '2,9p' "recipes/default/run.sh" >&2; exit 2 ;;
  esac
done
data=$(realpath "$data")
mkdir -p "$output" && output=$(realpath "$output")

all="squad nq-para medquad-train pydocstring cosqa-train-small tldr nl2bash strategyqa-facts trivia-answers nqopen-answers
     clapnq-answers acl-title-abstract scifact"
few="tldr nq-para scifact"
case $budget in
  tiny) sets=$few recipe=cpu steps=(30 8 8 3) queries=48 evaluate="nano-tldr nano-selqa" limit="--limit 40" ;;
  cpu) sets=$all recipe=cpu steps=(240 48 90 80) queries=160 limit="" ;;
  gpu) sets=$all recipe=gpu steps=("" 600 600 "") queries=2000 limit="" ;;
  *) echo "--budget $budget: tiny, cpu or gpu" >&2; exit 2 ;;
esac
sft=() rl=()
if [ "$budget" = tiny ]; then
  sft=("batch.queries=12" "batch.document_tokens=80")
  rl=("sources=[{path: tldr, limit: 150, documents: 150}, {path: nq-para, limit: 150, documents: 150}]" "group.queries=4")
fi
evaluate=${evaluate:-nano-cosqa nano-cranfield nano-medicalqa nano-mkqa-en nano-nfcorpus nano-paper-tldr nano-scifact nano-selqa
  nano-theoremqa nano-tldr}

# sources EXTRA...: a YAML list of the sets with their negatives, once for each EXTRA (SET stands for the set's name).
sources() {
  for extra in "$@"; do
    for set in $sets; do
      echo "{path: $set, negatives: $set/negatives.jsonl${extra//SET/$set}}"
    done
  done | paste -sd, | sed 's/.*/[&]/'
}

# stage NAME RECIPE STEPS OVERRIDE...: a training stage, gone on with or passed over where it is done.
stage() {
  local name=$1 file=$2 count=$3 kind=sft
  shift 3
  [ -d "$output/$name/model" ] && return
  [ "$name" = rl ] && kind=rl
  local changes=("${@/#/--set=}")
  [ -n "$count" ] && changes+=("--set=steps=$count")
  search-r3 train $kind "recipes/$file" --data "$data" --output "$output/$name" --resume "${changes[@]}"
}

echo "== prepare"
for set in $sets; do
  [ -f "$data/$set/negatives.jsonl" ] || search-r3 mine "$data/$set" -o "$data/$set/negatives.jsonl"
  [ -f "$data/$set/quotes.jsonl" ] || search-r3 bootstrap "$data/$set" -o "$data/$set/quotes.jsonl" --quote
done

echo "== stage 1: embed"
stage sft "smollm2-135m-$recipe.yaml" "${steps[0]}" "sources=$(sources '')" ${sft[@]+"${sft[@]}"}

echo "== cold start of reasoning: write"
stage write smollm2-135m-write-cpu.yaml "${steps[1]}" "model=$output/sft/model" "sources=$(sources ', thoughts: SET/quotes.jsonl')" \
  ${sft[@]+"${sft[@]}"}
for set in $sets; do  # gone on with where it was interrupted
  search-r3 bootstrap "$data/$set" -o "$output/own-$set.jsonl" -c "$output/write/model" --limit "$queries" --samples 1 \
    --temperature 0.5 --max-new-tokens 40 --least-words 6 --keep-all --precision bfloat16
  cp "$output/own-$set.jsonl" "$data/$set/own.jsonl"
done

echo "== cold start of reasoning: think"
stage think smollm2-135m-think-cpu.yaml "${steps[2]}" "model=$output/sft/model" \
  "sources=$(sources ', weight: 2' ', thoughts: SET/own.jsonl, only_thoughts: true')" ${sft[@]+"${sft[@]}"}

echo "== stage 2: reinforce"
stage rl "smollm2-135m-rl-$recipe.yaml" "${steps[3]}" "model=$output/think/model" ${rl[@]+"${rl[@]}"}
# Stage 2 costs direct search a little; between the models before and after it lies one that it does not.
[ -d "$output/model" ] || search-r3 average "$output/think/model" "$output/rl/model" -o "$output/model" --weight 0.6

# measure NAME CHECKPOINT SAMPLES MODES
measure() {
  [ -f "$output/results-$1.json" ] && return
  # shellcheck disable=SC2086
  search-r3 eval ${evaluate//nano-/$data/nano-} -c "$2" --samples "$3" --modes "$4" $limit --max-tokens 128 --max-new-tokens 48 \
    --precision bfloat16 -o "$output/results-$1.json"
}
echo "== evaluate"
measure base base 1 direct
measure variant-1 "$output/model" 1 direct,reason
measure model "$output/model" 8 direct,reason,fused,hybrid,reason-hybrid,control-repeat,control-fixed,control-other,bm25,minilm

echo "== package"
[ -d "$output/adapter" ] || search-r3 package "$output/model" -o "$output/adapter"
echo "== report"
python recipes/default/report.py --run "$output" --data "$data" --page "$output/results" --card "$output/adapter"
echo "The adapter is in $output/adapter, the results in $output/results.md."
