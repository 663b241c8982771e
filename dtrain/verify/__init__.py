"""Whether all of a run, a round or a store is intact: `dtrain verify`.

fault.py     what is not intact, in a line
place.py     what lies at a path
run.py       a run: its files, its history, its rounds
rounds.py    a committed round
store.py     a store: each stored object is read and decoded
contents.py  what is known of a store while it is looked at
array.py     the grid of an array, and what its absent chunks mean
result.py    what has been looked at of a store
manifest.py  the contents of a store in a file, and what differs from it
threads.py   some calls at a time, with results in order
"""
