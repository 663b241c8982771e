"""Who watches a run. A reporter is a function of one event; nothing below this folder imports it.

history.py    RoundResult -> a line of history.jsonl, and back
dataset.py    lines of history.jsonl -> an xarray.Dataset
journal.py    events -> the files of the run directory
watch.py      the files of a run -> lines, for another process
view.py       events -> what is known of a run while it trains: a pure fold, shown by the next three
page.py       a run as HTML and as text
notebook.py   events -> one output of a notebook
progress.py   events -> the terminal
messages.py   events -> messages to the page in Dask's dashboard
lines.py      events -> lines of text
table.py      rounds -> a table that grows
pace.py       rounds -> speed and time left
curve.py      numbers -> curves as SVG
"""
