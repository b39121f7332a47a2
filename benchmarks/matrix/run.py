"""The release matrix: every engine release that matters, probed and put through the conformance kit.

    python -m benchmarks.matrix.run [sglang==0.5.18 | sglang | vllm …]   # all of them by default
    python -m benchmarks.matrix.run sglang --only DenseEngine RecordedEngine   # columns of these fixtures; the others stay
    python -m benchmarks.matrix.run --newest                             # what the index offers newest: differences, exit status

Each release's wheel is probed statically first. If nothing is missing, the kit runs over the real engine, in the lightest
environment in which its modules import on a CPU. There is one environment at a time; it is removed after its engine. Results
go to `benchmarks/results/releases.json`.
"""

from __future__ import annotations

import argparse
import datetime
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.matrix.engines import ENGINES, Engine
from benchmarks.matrix.static import Wheel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "releases.json"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
Row = dict[str, Any]


def fetch(requirement: str, folder: Path) -> Path:
    """Download an engine's wheel; returns its path."""
    command = [sys.executable, *PIP, "download", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    name = requirement.partition("==")[0]
    return next(folder.glob(f"{name}-*.whl"))


def release_of(wheel: Path) -> str:
    """The release in a wheel's name."""
    return wheel.name.split("-")[1]


def pins(wheel: Path, names: Sequence[str]) -> list[str]:
    """The exact requirements (`name==version`) that a wheel's metadata has on some distributions."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(member))
    wanted = [re.match(r"([A-Za-z0-9_.-]+)==[^;, ]+$", line.strip()) for line in metadata.get_all("Requires-Dist", [])]
    return [match[0] for match in wanted if match and match[1] in names]


def prepare(engine: Engine, environment: Path, wheel: Path) -> Path:
    """Make an environment for the release in `wheel`, or change the one that is there; returns its Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        lines = engine.requirements.read_text().splitlines()
        kept = [line for line in lines if line and not line.startswith(("#", *engine.pinned, "tokenizers"))]
        _pip(python, *kept)
        if engine.bare:
            _pip(python, "--no-deps", *engine.bare)
    if pinned := pins(wheel, engine.pinned):
        _pip(python, *pinned)
    _pip(python, "--no-deps", str(wheel))
    return python


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, *PIP, "install", "--no-compile", *arguments], check=True, stderr=subprocess.DEVNULL)


def check(name: str, wheel: Path, environment: Path, only: Sequence[str] = ()) -> Row:
    """Make a release's row: what is faithful, what was only probed, what is left alone, and why.

    With `only`, fixtures of the kit, it has their columns alone, once the kit has run.
    """
    engine, source = ENGINES[name], Wheel(wheel)
    needs = next((needs for needs in engine.needs if source.module(needs.module) is not None), engine.needs[0])
    found = {
        path: {strategy: source.missing(wanted) for strategy, wanted in strategies.items()}
        for path, strategies in needs.paths.items()
    }
    row: Row = {
        "engine": name,
        "release": release_of(wheel),
        "date": datetime.date.today().isoformat(),
        "how": "static",
    }
    cells = {
        path: {
            strategy: f"unsupported: {problems[0]}" if problems else "static only"
            for strategy, problems in strategies.items()
        }
        for path, strategies in found.items()
    }
    row["paths"] = cells
    if unexamined := engine.unexamined(source):
        row["unexamined"] = unexamined
    if all(problems for strategies in found.values() for problems in strategies.values()):
        return row
    python = prepare(engine, environment, wheel)
    variables = {**os.environ, **dict(engine.variables), "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in (ROOT, *engine.path))
    command = [str(python), "-m", "benchmarks.matrix.check", name, *only]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        row["why static"] = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return row
    row.update(how="kit", environment=report["environment"], skipped=report["skipped"])
    row["problems"] = [f"{line}: {problem}" for line, problems in report["lines"].items() for problem in problems]
    for path, strategies in report["values"].items():
        for strategy, problems in strategies.items():
            cells.setdefault(path, {})[strategy] = f"differs: {problems[0]}" if problems else "faithful"
    for path, problem in report["left out"].items():
        cells[path] = dict.fromkeys(("graph", "share", "copy"), f"unsupported: {problem}")
    if only:
        row["paths"] = {path: cells[path] for path in cells if path in report["values"] or path in report["left out"]}
    return row


def merged(known: Row, row: Row, only: Sequence[str]) -> Row:
    """A release's row with the columns of another that fixtures have made alone; their date is among `dates`.

    Raises
    ------
    ValueError
        The two were not made alike, so that they can't be one row.
    """
    expected, found = known.get("environment"), row.get("environment", row.get("why static", "static"))
    if expected != found:
        raise ValueError(
            f"{row['engine']} {row['release']}: looked for the environment of the committed row, {expected}, found {found}; "
            "run it without --only"
        )
    kept = [problem for problem in known["problems"] if not any(f": {fixture}: " in problem for fixture in only)]
    dates = known.get("dates", {}) | dict.fromkeys(row["paths"], row["date"])
    return known | {
        "paths": known["paths"] | row["paths"],
        "problems": kept + row["problems"],
        "skipped": {what: why for what, why in known["skipped"].items() if what not in only} | row["skipped"],
        "dates": {path: date for path, date in dates.items() if date != known["date"]},
    }


def differences(rows: Sequence[Row]) -> list[str]:
    """A line for each problem: what the kit found, and paths that are not faithful."""
    lines = []
    for row in rows:
        head = f"{row['engine']} {row['release']}"
        lines += [f"{head}: {problem}" for problem in row.get("problems", [])]
        lines += [f"{head}: not examined: {path}" for path in row.get("unexamined", [])]
        if "why static" in row:
            lines.append(f"{head}: the kit did not run: {row['why static']}")
        for path, strategies in row["paths"].items():
            if (states := set(strategies.values())) != {"faithful"}:
                lines.append(f"{head}: {path}: {'; '.join(sorted(states))}")
    return lines


def save(rows: Sequence[Row]) -> None:
    """Write rows to the committed results. They replace older ones of the same release."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    by_release = {(row["engine"], row["release"]): row for row in (*known, *rows)}
    order = [(name, release) for name, engine in ENGINES.items() for release in engine.releases]
    kept = [by_release[key] for key in order if key in by_release]
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="sglang==0.5.18, or an engine's name for all of its releases")
    parser.add_argument(
        "--newest", action="store_true", help="the newest releases that the index offers; writes no results"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FIXTURE", help="a class that the kit runs on: DenseEngine"
    )
    options = parser.parse_args()
    if options.newest and options.only:
        parser.error("--newest tries everything, without --only")
    committed = (
        {(row["engine"], row["release"]): row for row in json.loads(RESULTS.read_text())} if options.only else {}
    )
    requests = options.releases or list(ENGINES)
    rows: list[Row] = []
    for name, engine in ENGINES.items():
        wanted = [request.partition("==")[2] for request in requests if request.partition("==")[0] == name]
        releases = engine.releases if "" in wanted and not options.newest else wanted
        environment = ROOT / f".venv-matrix-{name}"
        try:
            for release in releases:
                with tempfile.TemporaryDirectory() as folder:
                    requirement = f"{name}=={release}" if release else name
                    row = check(name, fetch(requirement, Path(folder)), environment, options.only)
                if options.only:
                    row = merged(committed[name, row["release"]], row, options.only)
                rows.append(row)
                if not options.newest:
                    save([row])
                print(json.dumps(row, indent=1), flush=True)
        finally:
            shutil.rmtree(environment, ignore_errors=True)
    if options.newest:
        lines = differences(rows)
        print("\n".join(lines) or "nothing is different")
        return bool(lines)
    return any(row.get("problems") or "why static" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
