#!/usr/bin/env bash
# DeepSeek V3.2 with MTP in vLLM, with the plugin. It loads by itself: `pip install nsa-plugin` into vLLM's environment.
# `nsa-plugin doctor` says what it will do here.
set -euo pipefail

# vLLM serves the metrics of its worker processes if this directory is named, and empty, at the start.
export PROMETHEUS_MULTIPROC_DIR="${PROMETHEUS_MULTIPROC_DIR:-$(mktemp -d)}"
export NSA_PLUGIN_METRICS="${NSA_PLUGIN_METRICS:-prometheus}"

exec vllm serve "${MODEL:-deepseek-ai/DeepSeek-V3.2-Exp}" \
  --tensor-parallel-size "${TP:-8}" \
  --kv-cache-dtype fp8 \
  --speculative-config '{"method": "mtp", "num_speculative_tokens": 3}' \
  "$@"
