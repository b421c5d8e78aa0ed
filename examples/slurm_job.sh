#!/usr/bin/env bash
# sbatch slurm_job.sh: one fine-tune with the safety step on one node, its exit code the gate's.
# After it: sacct -j JOB --format=ExitCode shows 4:0 for a rejected one.
#SBATCH --job-name=safeguarded
#SBATCH --nodes=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --time=10:00:00
# to this script, which passes it on: without B: only what srun has started gets it
#SBATCH --signal=B:TERM@120
#SBATCH --output=safeguarded-%j.log
set -euo pipefail

line="${LINE:?set LINE to the folder of the model line, on storage that all nodes share}"
code=0
# the step says what it was at, and leaves nothing half-written; wait ends when the signal comes
trap 'kill -TERM "$!" || true' TERM
safegene sft --accelerate_config zero3 --num_processes 4 --config "$line/recipe.yaml" \
  --output_dir "$line/out-$SLURM_JOB_ID" \
  --safegene.output.history "$line/history.jsonl" \
  --safegene.gate.min_refusal_rate 0.8 &
wait "$!" || code=$?
while kill -0 "$!" 2>/dev/null; do
  code=0
  wait "$!" || code=$?
done
safegene history "$line/history.jsonl" --html "$line/line.html" || true # 3: refusals drift
if [ "$code" -eq 3 ]; then
  echo "accepted as best effort: too few prompts to be sure of every limit"
  code=0
fi
exit "$code"
