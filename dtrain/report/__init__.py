"""Who watches a run. A reporter is a function of one event; nothing below this folder imports it.

history.py    RoundResult -> a line of history.jsonl, and back
dataset.py    lines of history.jsonl -> an xarray.Dataset
journal.py    events -> the files of the run directory
lines.py      events -> lines of text
progress.py   events -> the terminal
notebook.py   events -> one output of a notebook
"""
