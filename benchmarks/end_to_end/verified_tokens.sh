#!/bin/sh
# The refreshed target of vLLM, on one GPU: the kernel, what it adds to the graph, and complete engines with and without the
# plugin. Host time of metadata a round is "verify metadata" and "verify graph" of the probe; launches are in the profiles.
#
#     benchmarks/end_to_end/verified_tokens.sh PLUGIN PROBE OUT      (folders as in run.py)
set -e
plugin=$1 probe=$2 out=$3
root=$(dirname "$0")/../..
mkdir -p "$out"
(cd "$root" && python -m pytest tests/gpu/test_group_rows.py -q -p no:cacheprovider -m gpu)
(cd "$root" && python -m benchmarks.gpu.group_rows --json "$out/group_rows.json")
python "$root/benchmarks/end_to_end/run.py" --engine vllm --plugin "$plugin" --probe "$probe" --steps 3 7 --batch 1 8 32 \
    --prompt 1024 --most 5 --seconds-per-cell 25 --out "$out/paired" --json "$out/paired.json"
for steps in 3 7; do  # every round is verified, 1,000 of them and more
    python "$root/benchmarks/end_to_end/operations.py" --engine vllm --plugin "$plugin" --probe "$probe" --steps $steps \
        --verify 1 --new-tokens 1000 --out "$out/verified-$steps" --json "$out/verified-$steps.json"
done
