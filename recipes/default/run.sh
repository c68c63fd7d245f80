#!/usr/bin/env bash
# From the untrained model to an adapter to ship (the default was made by the recipes of --budget gpu):
#   prepare -> bootstrap -> train sft (with --budget cpu twice) -> train rl -> package -> eval -> report
#
#   recipes/default/run.sh --data data --output runs/default --budget tiny|cpu|gpu
#
# tiny: three training sets, a few small steps: under half an hour on two cores; shows that all of it works.
# cpu: hours on two cores with native bfloat16.   gpu: stage 1 on one GPU; stage 2 is the same.
# Interrupted, the same command goes on. Every stage leaves its result in --output; remove it and all later ones to do it
# again. Negatives, which no budget changes, stay with the data; what the untrained model writes is copied to them, over
# an untrained.jsonl that is there.
set -euo pipefail
data=data output=runs/default budget=cpu
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    --budget) budget=$2; shift 2 ;;
    *) sed -n '2,11p' "$0" >&2; exit 2 ;;
  esac
done
data=$(realpath "$data")
mkdir -p "$output" && output=$(realpath "$output")
cd "$(dirname "$0")/../.."

sets="squad nq-para medquad-train pydocstring cosqa-train-small tldr nl2bash strategyqa-facts trivia-answers nqopen-answers
      clapnq-answers acl-title-abstract scifact"
evaluate="nano-cosqa nano-cranfield nano-medicalqa nano-mkqa-en nano-nfcorpus nano-paper-tldr nano-scifact nano-selqa nano-theoremqa
          nano-tldr"
mined="" recipe=$budget thoughts=400 limit="" sft=() rl=()
case $budget in
  tiny)
    sets="tldr nq-para scifact" recipe=cpu thoughts=48 evaluate="nano-tldr nano-selqa" limit="--limit 40"
    direct="{path: tldr, negatives: tldr/negatives.jsonl}, {path: nq-para, negatives: nq-para/negatives.jsonl}"
    held_out="held_out=[nano-tldr, nano-selqa, covid-faq, perlfaq]"
    sft=("$held_out" "steps=30" "batch.queries=12" "batch.document_tokens=80"
      "sources=[$direct, {path: nq-para, thoughts: nq-para/untrained.jsonl, only_thoughts: true},
                {path: scifact, negatives: scifact/negatives.jsonl, thoughts: scifact/untrained.jsonl, only_thoughts: true}]")
    rl=("$held_out" "steps=3" "group.queries=4"
      "sources=[{path: tldr, limit: 150, documents: 150}, {path: nq-para, limit: 150, documents: 150}]")
    ;;
  cpu) ;;
  gpu) thoughts=2000 mined="conala gorilla-api" ;;
  *) echo "--budget $budget: tiny, cpu or gpu" >&2; exit 2 ;;
esac

# stage KIND NAME OVERRIDE...: a training stage, gone on with or passed over where it is done.
stage() {
  local kind=$1 name=$2 file=smollm2-135m-$recipe.yaml
  shift 2
  [ -d "$output/$name/model" ] && return
  [ "$kind" = rl ] && file=smollm2-135m-rl-cpu.yaml
  search-r3 train "$kind" "recipes/$file" --data "$data" --output "$output/$name" --resume "${@/#/--set=}"
}

echo "== prepare"
[ -d "$output/initial" ] || search-r3 init base "$output/initial" --prompts recipes/default/prompts.json
for set in $sets $mined; do  # squad's own documents are enough, but on a GPU
  [ -f "$data/$set/negatives.jsonl" ] || { [ "$set" = squad ] && [ "$budget" != gpu ]; } ||
    search-r3 mine "$data/$set" -o "$data/$set/negatives.jsonl"
done

echo "== bootstrap: what the untrained model writes about queries"
for set in $sets; do  # gone on with where it was interrupted
  [ -d "$output/sft/model" ] ||
    search-r3 bootstrap "$data/$set" -o "$output/untrained-$set.jsonl" -c "$output/initial" --limit "$thoughts" --samples 1 \
      --temperature 0.7 --max-new-tokens 40 --least-words 6 --keep-all --precision bfloat16
  cp "$output/untrained-$set.jsonl" "$data/$set/untrained.jsonl"
done

echo "== stage 1: embed, with and without such a text"
stage sft sft "model=$output/initial" ${sft[@]+"${sft[@]}"}
trained=$output/sft/model
if [ "$budget" = cpu ]; then
  echo "== stage 1, again: queries drawn anew, at a lower rate"
  stage sft sft-2 "model=$trained" seed=1 learning_rate=3e-4
  trained=$output/sft-2/model
fi
echo "== stage 2: reinforce"
stage rl rl "model=$trained" ${rl[@]+"${rl[@]}"}

# measure NAME CHECKPOINT SAMPLES MODES
measure() {
  [ -f "$output/results-$1.json" ] && return
  # shellcheck disable=SC2086
  search-r3 eval ${evaluate//nano-/$data/nano-} -c "$2" --samples "$3" --modes "$4" $limit --max-tokens 256 --max-new-tokens 40 \
    --precision bfloat16 -o "$output/results-$1.json"
}
echo "== package"
[ -d "$output/adapter" ] || search-r3 package "$output/rl/model" -o "$output/adapter" --rank 26  # the most in 16 MB
echo "== evaluate what ships"
measure base base 1 direct
measure variant-1 "$output/adapter" 1 direct,reason
measure model "$output/adapter" 8 \
  direct,reason,fused,hybrid,reason-hybrid,fused-hybrid,control-repeat,control-fixed,control-other,control-fused,bm25,minilm,minilm-hybrid

echo "== report"
python recipes/default/report.py --run "$output" --data "$data" --page "$output/results" --card "$output/adapter" \
  --budget "$budget"
echo "The adapter is in $output/adapter, the results in $output/results.md."
