#!/usr/bin/env bash
# DeepSeek V3.2 with MTP in sglang, with the plugin. It loads by itself: `pip install nsa-plugin` into sglang's environment.
# Each variable can be given from outside; `nsa-plugin doctor` says what they will do here.
set -euo pipefail

# Compare every 1000th replay with sglang's own code (then the strategy is share, not graph); 0 is never.
export NSA_PLUGIN_VERIFY="${NSA_PLUGIN_VERIFY:-0}"
export NSA_PLUGIN_REPRO_DIR="${NSA_PLUGIN_REPRO_DIR:-/var/tmp/nsa-plugin}"
# Metrics appear under sglang's own /metrics, which --enable-metrics switches on.
export NSA_PLUGIN_METRICS="${NSA_PLUGIN_METRICS:-prometheus}"
# `touch` this file to go back to sglang's own path at run time (share and copy), `rm` it to return.
export NSA_PLUGIN_SWITCH_FILE="${NSA_PLUGIN_SWITCH_FILE:-/var/tmp/nsa-plugin.off}"

# Later options win: append your own, `TP=4` is `--tp-size 4`.
line="$(nsa-plugin launch sglang ${MODEL:+--model "$MODEL"})"
eval "exec $line --enable-metrics ${TP:+--tp-size $TP} \"\$@\""
