"""Who watches a run. A reporter is a function of one event; nothing below this folder imports it.

history.py    RoundResult -> a line of history.jsonl, and back to an xarray.Dataset
journal.py    events -> the files of the run directory
progress.py   events -> the terminal
"""
