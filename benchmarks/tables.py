"""Writes the tables of the documents, and what `nsa-plugin estimate` reads, from the committed results.

    python -m benchmarks.tables

A table stands between two markers in its document, and replaces what was there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import curve
from benchmarks.end_to_end.report import markdown as end_to_end
from benchmarks.matrix.render import table as releases
from benchmarks.measured import FILE, measured
from nsa_plugin.bench.report import BOUND_TEXT, number, title, to_bound

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SHOWN = {"batch_size": (1, 8, 32, 128), "context": (16384, 65536, 131072)}
"""The cells of the benchmark that its table shows; the result files have more."""


def bench(results: dict[str, Any]) -> str:
    """Host time, GPU time and kernels of every way to prepare, one line for each cell; the own launch where it is known."""
    cells = [cell for cell in results["cells"] if all(cell[key] in shown for key, shown in SHOWN.items())]
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    launched = [name for name in names if any(to_bound(cell, name) for cell in cells)]
    columns = [*names, "floor", *([f"{BOUND_TEXT}: {' / '.join(launched)}"] if launched else [])]
    lines = [
        f"{title(results)}; host / GPU / kernels, times in µs:",
        "",
        f"| mode | batch | context | steps | {' | '.join(columns)} |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for cell in cells:
        head = f"| {cell['mode']} | {cell['batch_size']} | {cell['context'] // 1024}K | {cell['steps']} | "
        entries = [_entry(cell["contenders"].get(name)) for name in names]
        entries.append(number(cell["floor_us"]))
        if launched:
            entries.append(" / ".join(number(to_bound(cell, name), 2) for name in launched))
        lines.append(head + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    times = f"{number(row['host_us'])} / {number(row['gpu_us'])} / {number(row['kernels'], 0)}"
    return times + (" (stale)" if row["differs"] else "")


def stale_schedules(cells: list[dict[str, Any]]) -> str:
    """Time of the indexer's logits with a fresh and with a stale schedule: contexts by batch sizes."""
    sizes = sorted({cell["bs"] for cell in cells})
    lines = [f"| context | {' | '.join(f'batch {size}' for size in sizes)} |", "|---|" + "---|" * len(sizes)]
    for context in sorted({cell["ctx"] for cell in cells}):
        found = {cell["bs"]: f"{cell['fresh_us']} → {cell['stale_us']}" for cell in cells if cell["ctx"] == context}
        lines.append(f"| {context // 1024}K | {' | '.join(found.get(size, '–') for size in sizes)} |")
    return "\n".join(lines)


def accepted(results: dict[str, Any]) -> str:
    """Accepted length with the engine's lengths and with exact ones, by number of steps."""
    prefix = "accept_length_steps_"
    lines = ["| steps | engine's lengths | exact lengths | change |", "|---|---|---|---|"]
    for name, shipped in results["engine"].items():
        if name.startswith(prefix):
            exact = results["exact"][name]
            change = 100 * (exact / shipped - 1)
            lines.append(f"| {name.removeprefix(prefix)} | {shipped:.3f} | {exact:.3f} | {change:+.1f} % |")
    return "\n".join(lines)


def accepted_in_engine(results: dict[str, Any]) -> str:
    """Accepted length in a complete engine, and the change against no plugin, by number of steps."""
    cells = sorted(results["steps"].items(), key=lambda item: int(item[0]))
    variants = list(dict.fromkeys(name for _, cell in cells for name in cell))
    lines = [
        f"{results['engine']}, {results['machine']}, {results['date']}; change as a ratio with its 95 % interval, over "
        f"prompts; prompts with the same tokens as without the plugin:",
        "",
        f"| steps | {' | '.join(variants)} |",
        "|---|" + "---|" * len(variants),
    ]
    lines += [f"| {steps} | {' | '.join(_accepted(cell[name]) for name in variants)} |" for steps, cell in cells]
    return "\n".join(lines)


def _accepted(found: dict[str, Any]) -> str:
    change = found.get("against no plugin")
    if change is None:
        return f"{found['accepted']:.3f}"
    ratio, low, high = (100 * (value - 1) for value in (change["ratio"], *change["interval"]))
    seen = "the same" if low == high == 0 else f"{ratio:+.1f} %, {low:+.1f} to {high:+.1f} %"
    return f"{found['accepted']:.3f} ({seen}; {change['prompts with the same tokens']} of {change['prompts']} prompts)"


def graph_time(results: dict[str, Any]) -> str:
    """What metadata add to the time of a captured graph, by how derived planes are computed; the last way saves so much."""
    ways = [way for way in ("in turn", "side by side", "FlashMLA once", "saved") if way in results["cells"][0]]
    lines = [
        f"{results['machine']}, {results['date']}; {results['ctx'] // 1024}K, {results['steps']} steps; µs, median and "
        "95 % interval:",
        "",
        f"| mode | batch | {' | '.join(ways)} |",
        "|---|---|" + "---|" * len(ways),
    ]
    for cell in results["cells"]:
        entries = [
            f"{cell[way]['us']:.1f} ({cell[way]['interval'][0]:.1f} to {cell[way]['interval'][1]:.1f})" for way in ways
        ]
        lines.append(f"| {cell['mode']} | {cell['bs']} | {' | '.join(entries)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A generated part of a document.

    Attributes
    ----------
    document : path from the root of the repository
    name : what its markers say
    render : makes the Markdown text of one result file
    results : result files, without folder and suffix; none if `render` finds what it needs
    """

    document: str
    name: str
    render: Callable[..., str]
    results: tuple[str, ...] = ()

    def text(self) -> str:
        """The Markdown text, made from the result files."""
        if not self.results:
            return self.render()
        return "\n\n".join(self.render(json.loads((RESULTS / f"{name}.json").read_text())) for name in self.results)


PERFORMANCE, ENGINES = "docs/performance.md", "docs/engines.md"
TABLES = (
    Table(ENGINES, "releases", releases, ("releases",)),
    Table(PERFORMANCE, "61 layers", end_to_end, ("end_to_end_sglang_61_layers_h200", "end_to_end_vllm_61_layers_h200")),
    Table(PERFORMANCE, "stale", stale_schedules, ("stale_schedule_h100",)),
    Table(PERFORMANCE, "accepted", accepted, ("exact_lengths_small_model_h100",)),
    Table(PERFORMANCE, "bench sglang", bench, ("bench_sglang_decode_h100", "bench_sglang_verify_extend_h100")),
    Table(PERFORMANCE, "bench vllm", bench, ("bench_vllm_decode_h100",)),
    Table(PERFORMANCE, "accepted in sglang", accepted_in_engine, ("acceptance_sglang_h200",)),
    Table(PERFORMANCE, "side by side", graph_time, ("graph_time_h200",)),
    Table(PERFORMANCE, "pooled, 163,840 columns", bench, ("bench_sglang_pooled_163840_h200",)),
    Table(PERFORMANCE, "pooled, 1,048,576 columns", bench, ("bench_sglang_pooled_1048576_h200",)),
    Table(PERFORMANCE, "curve", curve.table),
    Table(
        PERFORMANCE, "long contexts", end_to_end,
        ("end_to_end_sglang_8_layers_long_4_steps_h200", "end_to_end_sglang_8_layers_long_7_steps_h200"),
    ),
    Table(PERFORMANCE, "163,840 columns", end_to_end, ("end_to_end_sglang_8_layers_width_163840_h200",)),
    Table(PERFORMANCE, "1,048,576 columns", end_to_end, ("end_to_end_sglang_8_layers_width_1048576_h200",)),
    Table(PERFORMANCE, "batch 256", end_to_end, ("end_to_end_sglang_8_layers_large_batch_h200",)),
    Table(
        PERFORMANCE, "accepted, equal weights", accepted_in_engine,
        ("acceptance_equal_weights_sglang_h200", "acceptance_equal_weights_vllm_h200"),
    ),
    Table(PERFORMANCE, "pooled, sglang", end_to_end, ("end_to_end_sglang_glm5_next_h200",)),
    Table(PERFORMANCE, "dense, sglang", end_to_end, ("end_to_end_sglang_dense_fa3_h200",)),
    Table(PERFORMANCE, "bench sglang, fa3", bench, ("bench_sglang_fa3_h200",)),
    Table(PERFORMANCE, "bench sglang, FlashMLA", bench, ("bench_sglang_flashmla_h200",)),
    Table(PERFORMANCE, "pooled, vLLM", end_to_end, ("end_to_end_vllm_glm5_next_h200",)),
    Table(PERFORMANCE, "dense, FLASH_ATTN_MLA", end_to_end, ("end_to_end_vllm_dense_flash_attn_mla_h200",)),
    Table(PERFORMANCE, "dense, FLASHMLA, bf16", end_to_end, ("end_to_end_vllm_dense_flashmla_bf16_h200",)),
    Table(PERFORMANCE, "dense, FLASHMLA, fp8", end_to_end, ("end_to_end_vllm_dense_flashmla_fp8_h200",)),
    Table(PERFORMANCE, "sglang, 2 layers", end_to_end, ("end_to_end_sglang_2_layers_h200",)),
    Table(PERFORMANCE, "vLLM, 32 layers", end_to_end, ("end_to_end_vllm_32_layers_h200",)),
    Table(PERFORMANCE, "two layers", end_to_end, ("end_to_end_sglang_h100", "end_to_end_vllm_h100")),
    Table(
        PERFORMANCE, "two GPUs", end_to_end,
        ("end_to_end_sglang_tp2_h100", "end_to_end_sglang_dp2_h100", "end_to_end_vllm_tp2_h100"),
    ),
)  # fmt: skip


def replaced(document: str, name: str, table: str) -> str:
    """A document's text with another table between the markers. Raises ValueError if the markers are not there."""
    begin, end = f"<!-- {name}: generated by make tables, do not edit -->", f"<!-- /{name} -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the markers {begin} and {end}, got none; put them where the table belongs")
    return f"{head}{begin}\n\n{table}\n\n{end}{tail}"


def main() -> None:
    """Write every table into its document, the picture of the worth, and the file of `nsa-plugin estimate`."""
    FILE.write_text(measured())
    (ROOT / "docs" / "images" / "worth.svg").write_text(curve.draw())
    for table in TABLES:
        path = ROOT / table.document
        path.write_text(replaced(path.read_text(), table.name, table.text()))


if __name__ == "__main__":
    main()
