"""Where a run is executed: in this process (`serial.py`) or on a Dask cluster (`cluster.py`).

Both run the same functions (`tasks.py`) on the same resident objects (`resident.py`); only `tasks.py` turns numpy
into torch, only this folder runs tasks on Dask.
"""
