#!/usr/bin/env bash
# DeepSeek V3.2 with MTP in vLLM, with the plugin. It loads by itself: `pip install nsa-plugin` into vLLM's environment.
# `nsa-plugin doctor` says what it will do here.
set -euo pipefail

# Compare every 1000th draft with vLLM's own rebuild (then the strategy is copy, not graph); 0 is never.
export NSA_PLUGIN_VERIFY="${NSA_PLUGIN_VERIFY:-0}"
export NSA_PLUGIN_REPRO_DIR="${NSA_PLUGIN_REPRO_DIR:-/var/tmp/nsa-plugin}"
# vLLM serves the metrics of its worker processes if this directory is named, and empty, at the start.
export PROMETHEUS_MULTIPROC_DIR="${PROMETHEUS_MULTIPROC_DIR:-$(mktemp -d)}"
export NSA_PLUGIN_METRICS="${NSA_PLUGIN_METRICS:-prometheus}"

# Later options win: append your own, `TP=4` is `--tensor-parallel-size 4`.
line="$(nsa-plugin launch vllm ${MODEL:+--model "$MODEL"})"
eval "exec $line ${TP:+--tensor-parallel-size $TP} \"\$@\""
