"""Draw and print the errors of the forecasts beside baselines, by lead. Run: python figure.py

Needs matplotlib. Draws the runs that are there: federated, and a1b, e1 and pooled for the comparison.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import dtrain

SITES = ("a1b", "e1")
RUNS = ("federated", "pooled", "a1b", "e1")
YEARS, LEADS = 10, 5
TRAIN, TEST = slice("1860", "2037"), slice("2077", "2094")  # the first and last year of test windows are 2068 and 2099


def windows(temperature):
    """Return the last years, float64[anchor, year, place], and the next ones, float64[anchor, lead, place]."""
    values = temperature.values.astype("float64").reshape(len(temperature), -1)
    anchors = range(YEARS - 1, len(values) - LEADS)
    past = np.stack([values[anchor - YEARS + 1 : anchor + 1] for anchor in anchors])
    return past, np.stack([values[anchor + 1 : anchor + 1 + LEADS] for anchor in anchors])


def ridge(past, future, penalty=0.001):
    """Return weights[2 x year, lead] of a place's years and of the mean of all places, for the change from now on."""
    x, y = features(past), future - past[:, -5:].mean(1, keepdims=True)
    x, y = x.transpose(0, 2, 1).reshape(-1, x.shape[1]), y.transpose(0, 2, 1).reshape(-1, LEADS)
    return np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ y)


def features(past):
    change = past - past[:, -5:].mean(1, keepdims=True)
    return np.concatenate([change, np.broadcast_to(change.mean(2, keepdims=True), change.shape)], axis=1)


def trend(temperature, anchors, years=30):
    """Return the line through the last years of each place, continued."""
    values = temperature.values.astype("float64").reshape(len(temperature), -1)
    time = np.arange(years)
    ahead = years - 1 + np.arange(1, LEADS + 1)[:, None]
    lines = (np.polyfit(time, values[anchor - years + 1 : anchor + 1], 1) for anchor in anchors)
    return np.stack([slope * ahead + start for slope, start in lines])


def main(directory):
    """Print the root mean square errors of the test years, and write forecast.png."""
    sites = {site: xr.open_zarr(Path(directory, f"{site}.zarr"), consolidated=False).air_temperature for site in SITES}
    weight = np.broadcast_to(np.cos(np.deg2rad(sites["a1b"].latitude.values))[:, None], (37, 49)).ravel()
    runs = {name: Path(directory, "runs", name) for name in RUNS if Path(directory, "runs", name).exists()}
    train_windows = [windows(temperature.sel(time=TRAIN)) for temperature in sites.values()]
    weights = ridge(*(np.concatenate(parts) for parts in zip(*train_windows, strict=True)))
    errors = {}
    for site, temperature in sites.items():
        anchors = np.flatnonzero(np.isin(temperature.time.dt.year, temperature.sel(time=TEST).time.dt.year))
        past, future = (part[anchors - YEARS + 1] for part in windows(temperature))
        base = past[:, -5:].mean(1, keepdims=True)
        guesses = {
            "climatology": temperature.sel(time=TRAIN).values.mean(0).ravel(),
            "persistence": past[:, -1:],
            "mean of 5 years": base,
            "trend of 30 years": trend(temperature, anchors),
            "ridge regression": base + np.einsum("nfp,fl->nlp", features(past), weights),
        }
        for name, run in runs.items():
            predicted = dtrain.load_run(run).predict(Path(directory, f"{site}.zarr"))
            predicted = predicted.air_temperature.sel(time=TEST).transpose("time", "lead", ...)
            guesses[name] = predicted.values.reshape(future.shape)
        for name, guess in guesses.items():
            errors[name, site] = np.sqrt((((guess - future) ** 2) * weight).sum(2).mean(0) / weight.sum())
    show(errors)
    draw(errors, Path(directory, "forecast.png"))


def show(errors):
    print("RMSE in K, all leads     a1b     e1")
    for name in dict.fromkeys(name for name, _ in errors):
        print(f"{name:20}" + "".join(f"{np.sqrt((errors[name, site] ** 2).mean()):8.3f}" for site in SITES))


def draw(errors, path):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    styles = {"persistence": "C7--", "mean of 5 years": "C8--", "trend of 30 years": "C1--", "ridge regression": "C2--"}
    for axis, site in zip(axes, SITES, strict=True):
        for name, style in {**styles, "federated": "C0o-"}.items():
            axis.plot(range(1, LEADS + 1), errors[name, site], style, label=name)
        axis.set(title=f"scenario {site.upper()}", xlabel="years ahead", xticks=range(1, LEADS + 1))
    axes[0].set(ylabel="RMSE of 2078 to 2099 (K)")
    axes[0].legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
