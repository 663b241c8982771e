"""The results of scan.py: medians, the limit, tables and a plot."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field

from peers import ENGINES
from peers.engine import Facts, Settings


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def brief(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


@dataclass
class Results:
    """All that has been measured.

    Parameters
    ----------
    layouts : list of str
        The stores.
    rows : int
        Of each store.
    cores : int
        For the limit.
    settings : dict
        By engine and store: the settings that are measured.
    """

    layouts: list[str]
    rows: int
    cores: int
    settings: dict[str, Settings] = field(default_factory=dict)
    runs: list[Facts] = field(default_factory=list)
    sweeps: list[Facts] = field(default_factory=list)
    conversions: list[Facts] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def medians(self, name: str, layout: str) -> Facts:
        """Return the medians of an engine, or nothing if it has not run."""
        own = ENGINES[name].role == "own"
        runs = [r for r in self.runs if r["engine"] == name and (own or r["store"] == layout) and "seconds" in r]
        if not runs:
            return {}
        rates = [r["rows"] / r["seconds"] for r in runs]
        medians = {
            "engine": name,
            "store": layout,
            "samples_per_second": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "settings": runs[0]["settings"],
            "rows": runs[0]["rows"],
        }
        for key in ("cpu", "mixed", "within", "across", "peak_rss", "peak_private"):
            medians[key] = statistics.median(r[key] for r in runs)
        return medians

    def limits(self) -> dict[str, float]:
        """Return the limit in seconds by layout."""
        limits = {}
        for layout in self.layouts:
            decoded = [m["cpu"] for name in ("decode-zarr", "decode-zarrs") if (m := self.medians(name, layout))]
            gathered = self.medians("gather", layout)
            if decoded and gathered:
                limits[layout] = (min(decoded) + gathered["cpu"]) / self.cores
        return limits

    def summary(self) -> list[Facts]:
        limits, rows = self.limits(), self.rows
        summary = []
        for layout in self.layouts:
            for name in ENGINES:
                if ENGINES[name].role in ("reader", "own") and (medians := self.medians(name, layout)):
                    if layout in limits:
                        medians["share_of_limit"] = medians["samples_per_second"] * limits[layout] / rows
                    summary.append(medians)
        return summary

    def failures(self) -> list[str]:
        return sorted({f"{r['engine']} on the {r['store']} store" for r in self.runs if "failed" in r})


def print_tables(results: Results, facts_by_layout: dict[str, Facts]) -> None:
    """Print a table for each store, how each engine shuffles, and notes."""
    summary = results.summary()
    for layout in results.layouts:
        facts = facts_by_layout[layout]
        size, stored = facts["bytes"] / 1e9, facts["stored_bytes"] / 1e9
        print(f"\n## {layout}: {results.rows:,} rows, {size:.2f} GB, {stored:.2f} GB stored\n")
        print_limit(results, layout)
        print_table(results, layout, [medians for medians in summary if medians["store"] == layout])
    print_notes(results, summary)


def print_limit(results: Results, layout: str) -> None:
    limits, rows = results.limits(), results.rows
    if layout in limits:
        roles = [name for name in ENGINES if ENGINES[name].role in ("decode", "gather")]
        parts = [f"{name} {m['cpu']:.2f}" for name in roles if (m := results.medians(name, layout))]
        print(
            f"Limit on {results.cores} cores: {limits[layout]:.2f} s, {rows / limits[layout]:,.0f} samples/s "
            f"(core-seconds: {', '.join(parts)}).\n"
        )


def print_table(results: Results, layout: str, summary: list[Facts]) -> None:
    columns = ("samples/s (least to most)", "share of the limit", "core-s", "peak MB (private)", "mixed", "score")
    print(f"| engine | {' | '.join(columns)} | settings |")
    print(f"|---|{'---:|' * len(columns)}---|")
    for m in summary:
        cells = [
            ENGINES[m["engine"]].title,
            f"{m['samples_per_second']:,.0f} ({m['least']:,.0f} to {m['most']:,.0f})",
            f"{m['share_of_limit']:.2g}" if "share_of_limit" in m else "",
            f"{m['cpu'] * results.rows / m['rows']:,.3g}",
            f"{m['peak_rss'] / 1e6:,.0f} ({m['peak_private'] / 1e6:,.0f})",
            f"{m['mixed']:.1f}",
            f"{m['within']:.2f} {m['across']:.2f}",
            brief(m["settings"]),
        ]
        print(f"| {' | '.join(cells)} |")
    for name, reason in results.left_out.items():
        if layout in ENGINES[name].layouts:
            print(f"| {ENGINES[name].title} |{' |' * len(columns)} left out: {reason} |")


def print_notes(results: Results, summary: list[Facts]) -> None:
    print("\nHow each shuffles:\n")
    for name in [name for name in ENGINES if any(m["engine"] == name for m in summary)]:
        print(f"- {ENGINES[name].title}: {ENGINES[name].shuffle}.")
    notes = [
        f"Before, in {made['seconds']:.0f} s: {made['stored_bytes'] / 1e9:.2f} GB in {conversion.title}, "
        f"{brief(made['settings'])}."
        for made in results.conversions
        if made["rows_of_store"] == results.rows and (conversion := ENGINES[made["engine"]].conversion)
    ]
    if any(m["engine"] == "per-sample" for m in summary):
        notes.append(f"{ENGINES['per-sample'].title}: measured on a random sample of the rows.")
    notes += [f"FAILED: {failure}." for failure in results.failures()]
    print("\n" + "\n".join(notes))


def plot(summary: list[Facts], file: str) -> None:
    """Draw the shares of the limit, one panel a store."""
    try:
        import matplotlib
    except ImportError:
        log("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary = [m for m in summary if "share_of_limit" in m]
    layouts = list(dict.fromkeys(m["store"] for m in summary))
    if not layouts:
        log("no limit was measured: no plot")
        return
    names = [name for name in ENGINES if any(m["engine"] == name for m in summary)][::-1]
    size = (3 + 4 * len(layouts), 1 + 0.4 * len(names))
    figure, panels = pyplot.subplots(1, len(layouts), figsize=size, sharey=True, squeeze=False)
    for panel, layout in zip(panels[0], layouts, strict=True):
        shown = [m for m in summary if m["store"] == layout]
        shares = [m["share_of_limit"] for m in shown]
        colours = ["#c44e52" if m["engine"] == "dtrain" else "#8c9bb0" for m in shown]
        bars = panel.barh([names.index(m["engine"]) for m in shown], shares, color=colours)
        panel.bar_label(bars, [f"{share:.2g}" for share in shares], padding=3)
        panel.axvline(1, color="black", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(names)), [ENGINES[name].title for name in names])
        panel.set_title(f"{layout} store")
        panel.set_xlabel("share of the limit of the cores")
        panel.set_xlim(0, max(1.05, *(1.2 * share for share in shares)))
    figure.tight_layout()
    figure.savefig(file)
