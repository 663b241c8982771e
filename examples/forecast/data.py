"""Write yearly air temperature over North America in two scenarios as two Zarr stores. Run: python data.py

Needs the files that iris-sample-data ships: pip install iris-sample-data h5netcdf h5py; and "dtrain[calendars]", since
years have 360 days. Met Office Unified Model; UK Open Government Licence.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import xarray as xr

SCENARIOS = {"a1b": "A1B_north_america.nc", "e1": "E1_north_america.nc"}


def read(file):
    """Return the yearly means of a file of iris-sample-data, in kelvin: float32[time, latitude, longitude]."""
    package = find_spec("iris_sample_data")
    if package is None:
        raise SystemExit("iris-sample-data holds the data: pip install iris-sample-data")
    return xr.open_dataset(Path(package.origin).parent / "sample_data" / file, engine="h5netcdf").air_temperature


def main(directory):
    """Write a1b.zarr and e1.zarr: air_temperature of the years 1860 to 2099."""
    for name, file in SCENARIOS.items():
        temperature = read(file).reset_coords(drop=True).drop_encoding()
        temperature.attrs = {"units": "K", "long_name": f"yearly mean air temperature, scenario {name.upper()}"}
        chunks = {"air_temperature": {"chunks": (12, *temperature.shape[1:])}}
        path = Path(directory, f"{name}.zarr")
        temperature.to_dataset(name="air_temperature").to_zarr(path, mode="w", encoding=chunks, consolidated=False)
        print(f"{path.name}: {dict(temperature.sizes)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
