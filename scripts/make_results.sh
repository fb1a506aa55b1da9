#!/usr/bin/env bash
# The committed comparisons under results/. Set STEPSMITH_DATA_DIR to a folder that holds the whole
# MNIST and Fashion-MNIST, or leave it unset to take them from the hub.
set -euo pipefail
cd "$(dirname "$0")/.."

compare() {  # NAME TASK RULE further options
  local name=$1 task=$2 rule=$3
  shift 3
  rm -rf "results/$name/full"
  stepsmith evaluate --task "$task" --rule "$rule" --recipe "$name" --folder "results/$name/full" "$@"
}

# Own tasks over the horizon the rules were meta-trained for, against all seven baselines.
own() {
  compare quadratic quadratic quadratic --seeds 1000 --tuning-seeds 100
  compare mlp-mnist mlp-mnist mlp-mnist --seeds 32
  compare convnet-mnist convnet-mnist convnet-mnist --seeds 32 --tuning-seeds 4
}

# Ten times that horizon.
long() {
  compare mlp-mnist-1000 mlp-mnist mlp-mnist --steps 1000 --seeds 16 --tuning-seeds 4 -b adam -b nag
  compare quadratic-1000 quadratic quadratic --steps 1000 --seeds 250 --tuning-seeds 50 -b adam -b momentum
  compare convnet-mnist-1000 convnet-mnist convnet-mnist --steps 1000 --seeds 8 --tuning-seeds 2 -b adam
}

"${@:-own}"
