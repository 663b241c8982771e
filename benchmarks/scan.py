"""Scan: shuffled batches of 256 rows delivered as torch tensors, one pass, no compute; beside the limit and the peers.

Needs: pip install -r benchmarks/requirements.txt
Run: python benchmarks/scan.py [--gb 2] [--dir DIR] [--repeats 3] [--json FILE] [--plot FILE] [--quick]
     [--python-newest PATH], the interpreter of an environment with requirements-newest.txt: insitubatch and annbatch
     need Python >= 3.12 and a newer Zarr than dtrain's. Their processes run there, by the same rules, without dtrain.

Two stores of the same rows, 256 float32 and one int64 each (stores.py): chunks of 4,096 rows, blosc-lz4, and shards of
16,384 rows made of chunks of 256, zstd. Each engine delivers every row once a pass, in batches of 256, shuffled anew
for each pass. Each repetition of each engine is a process of its own; repetitions are interleaved, and their order
rotates. A process makes one pass to warm up (workers are started, files in the page cache, pools warm), then up to
three that are timed, from asking for the first batch; their median counts. The loop that takes the batches copies the
label and the first feature of each row, in every engine. dtrain's passes are one endless stream, as an epoch loop has
it: what it reads ahead for the next pass counts in the pass before. Afterwards it is checked that in every pass every
row came exactly once and with its own label. Before the repetitions the settings of each engine are swept, one after
the other, on a smaller store of the same layout.

The limit: (core-seconds to decode every chunk once + core-seconds to gather its rows into batches) / cores, both user +
system time of a process that does nothing else. Decoding is done by zarr's own codecs or by zarrs, whichever needs
less; gathering is one call a batch into an arena of 64 MB. An engine's share of the limit is limit / seconds. Nothing
that decodes these stores on these cores exceeds 1, and since cores share caches and memory bandwidth, nothing reaches
it; what reads a format of its own, or memory, may.

"Core-s" is what a pass costs: user + system time of the process and its workers. On busy cores it says more than the
time; the limit in core-seconds stands above each table.

Memory: the peak of the resident bytes of the process and its children beyond those of the process after its imports,
sampled every 50 ms; worker processes count with their imports, because that is what they cost. "Private" leaves out
what is shared or mapped from files. "Mixed": from how many different runs of 4,096 consecutive rows a batch comes, on
average; a full shuffle of R such runs takes R * (1 - (1 - 1 / R)^256).

"Score": two numbers, both 0 for the order of the store and 1 for a random permutation (shuffle_score.py). Within
batches: (d - 1) / (d_random - 1), where d is the mean distance, in rows of the store, of consecutive rows of a batch,
and d_random = (rows + 1) / 3. Across batches: (u_stored - u) / (u_stored - u_random), where u is the mean L1 distance
between the shares that 64 equal parts of the store have in a batch, and 1 / 64.

The figures mean something only on idle cores, and as ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import stores
from peers import ENGINES
from peers.engine import BATCH, Conversion, Facts, Settings
from scan_process import run
from scan_report import Results, brief, log, plot, print_tables

PACKAGES = ["python", "dtrain", "torch", "numpy", "zarr", "zarrs", "numcodecs", "xarray", "dask", "xbatcher", "litdata"]
PACKAGES += ["insitubatch", "annbatch"]


def cost(result: Facts) -> float:
    """Return the figure that a sweep minimises: the seconds of the best pass, or its core-seconds for the limit."""
    key = "cpu" if ENGINES[result["engine"]].role in ("decode", "gather") else "seconds"
    return min((one[key] for one in result.get("passes", ())), default=float("inf"))


class Bench:
    """One invocation: it measures every engine on every store."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        rows, cores = stores.rows_of(arguments.gb), arguments.cores or available_cores()
        self.results = Results(arguments.stores, rows, cores)
        self.stores: dict[tuple[str, int], Facts] = {}

    def store(self, layout: str, gigabytes: float) -> Facts:
        rows = stores.rows_of(gigabytes)
        if (layout, rows) not in self.stores:
            log(f"store: {layout}, {rows:,} rows")
            self.stores[layout, rows] = stores.store(self.directory, layout, rows)
        return self.stores[layout, rows]

    def defaults(self, name: str) -> Settings:
        chosen: Settings = {key: value for axis in ENGINES[name].axes for key, value in axis[0].items()}
        if name == "dtrain":
            chosen["memory"] = self.arguments.memory
        if name == "per-sample" and self.arguments.quick:
            chosen["sample"] = 2 * BATCH
        return chosen

    def once(self, name: str, facts: Facts, settings: Settings) -> Facts:
        """Convert the store if the engine needs it, run the engine, and log the result."""
        if (conversion := ENGINES[name].conversion) is not None:
            made = self.convert(name, conversion, facts, settings)
            if "seconds" not in made:
                return self.logged(made)
            if made not in self.results.conversions:
                self.results.conversions.append(made)
        return self.logged(run(name, facts, settings, self.arguments.timeout, self.arguments.python_newest))

    def convert(self, name: str, conversion: Conversion, facts: Facts, settings: Settings) -> Facts:
        """Write the store in an engine's own format, unless it is there, and return its facts."""
        marker = conversion.folder(facts, settings).with_suffix(".json")
        if not marker.exists():
            made = run(name, facts, settings, self.arguments.timeout, self.arguments.python_newest, convert=True)
            if "seconds" not in made:
                return made
            kept = {key: settings[key] for key in conversion.settings}
            marker.write_text(json.dumps(made | {"settings": kept}))
            log(f"  {name}: {facts['rows']:,} rows converted in {made['seconds']:.1f} s, {brief(kept)}")
        return json.loads(marker.read_text())

    def logged(self, result: Facts) -> Facts:
        where = f"  {result['engine']} [{result['store']}] {brief(result['settings'])}: "
        if "left out" in result:
            log(where + f"left out, {result['left out']}")
            self.results.left_out[result["engine"]] = result["left out"]
        elif "failed" in result:
            log(where + f"FAILED\n{result['failed']}")
        else:
            log(
                where + f"{result['rows'] / result['seconds']:,.0f} samples/s, {result['seconds']:.2f} s, "
                f"{result['cpu']:.2f} core-seconds, {result['peak_rss'] / 1e6:.0f} MB"
            )
        return result

    def sweep(self, name: str, facts: Facts) -> Settings:
        """Return the best settings; one axis is varied after the other."""
        best, least = self.defaults(name), float("inf")
        for axis in ENGINES[name].axes:
            start = best
            for values in axis if len(axis) > 1 else ():
                tried = start | values
                if tried == start and least < float("inf"):
                    continue  # it has been measured on an axis before
                result = self.once(name, facts, tried)
                if "left out" in result:
                    return best
                self.results.sweeps.append(result)
                if cost(result) < least:
                    best, least = tried, cost(result)
        return best

    def places(self) -> list[tuple[str, str]]:
        """Return the engines to measure, each with a store."""
        arguments = self.arguments
        names = [name for name in ENGINES if name in arguments.engines]
        own = [(name, arguments.stores[0]) for name in names if ENGINES[name].role == "own"]
        readers = [name for name in names if ENGINES[name].role != "own"]
        return [(n, layout) for layout in arguments.stores for n in readers if layout in ENGINES[n].layouts] + own

    def choose_settings(self, places: list[tuple[str, str]]) -> None:
        arguments = self.arguments
        earlier = json.loads(Path(arguments.settings).read_text())["settings"] if arguments.settings else {}
        for name, layout in places:
            key = f"{name} {layout}"
            if key in earlier:
                self.results.settings[key] = earlier[key]
            elif arguments.quick or arguments.no_sweep:
                self.results.settings[key] = self.defaults(name)
            elif name not in self.results.left_out:
                self.results.settings[key] = self.sweep(name, self.store(layout, min(arguments.sweep_gb, arguments.gb)))

    def measure(self) -> None:
        arguments = self.arguments
        places = self.places()
        self.choose_settings(places)
        self.write()
        full = {layout: self.store(layout, arguments.gb) for layout in arguments.stores}
        for repeat in range(arguments.repeats):
            log(f"repetition {repeat + 1} of {arguments.repeats}")
            first = repeat * len(places) // arguments.repeats
            for name, layout in places[first:] + places[:first]:
                if name not in self.results.left_out:
                    result = self.once(name, full[layout], self.results.settings[f"{name} {layout}"])
                    self.results.runs.append(result | {"repeat": repeat})
            self.write()

    def write(self) -> None:
        """Write all that has been measured so far."""
        if self.arguments.json:
            private = ("dir", "json", "plot", "settings", "python_newest")
            content = {
                "arguments": {key: value for key, value in vars(self.arguments).items() if key not in private},
                "machine": {
                    "cores": self.results.cores,
                    "system": platform.system(),
                    "architecture": platform.machine(),
                },
                "versions": versions(sys.executable),
                "versions_newest": versions(newest, "-E") if (newest := self.arguments.python_newest) else None,
                "settings": self.results.settings,
                "limit_seconds": self.results.limits(),
                "summary": self.results.summary(),
                "conversions": self.results.conversions,
                "sweeps": self.results.sweeps,
                "runs": self.results.runs,
            }
            Path(self.arguments.json).write_text(json.dumps(content, indent=1) + "\n")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(python: str, *options: str) -> Facts:
    """Return the versions that an interpreter has of itself and of the packages that matter here."""
    code = "import json, platform, importlib.metadata as m; print(json.dumps({'python': platform.python_version()} | "
    code += "{one.name: one.version for one in m.distributions()}))"
    shown = subprocess.run([python, *options, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(shown.stdout)
    return {name: found.get(name) for name in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="decoded size of each store")
    parser.add_argument("--dir", help="where the stores are, or are written; default: temporary, removed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--stores", nargs="+", choices=stores.LAYOUTS, default=list(stores.LAYOUTS))
    parser.add_argument("--sweep-gb", type=float, default=0.5, help="decoded size of the stores for the sweeps")
    parser.add_argument("--no-sweep", action="store_true", help="take the first value of every setting")
    parser.add_argument("--settings", help="take the settings that an earlier run wrote with --json")
    parser.add_argument("--memory", default="512MB", help="dtrain's memory budget")
    parser.add_argument("--cores", type=int, help="for the limit; default: those this process may use")
    parser.add_argument(
        "--python-newest", help="interpreter with requirements-newest.txt; without it they are left out"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--json", help="write every run here")
    parser.add_argument("--plot", help="draw the shares of the limit here (.svg, .png)")
    parser.add_argument("--quick", action="store_true", help="0.25 GB, one repetition, no sweeps: a minute or two")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gb, arguments.repeats = min(arguments.gb, 0.25), 1
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.dir or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, directory)
        bench.measure()
        print_tables(bench.results, {layout: bench.store(layout, arguments.gb) for layout in arguments.stores})
        if arguments.plot:
            plot(bench.results.summary(), arguments.plot)
    sys.exit(1 if bench.results.failures() else 0)


if __name__ == "__main__":
    main()
