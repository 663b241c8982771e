"""The checks of ``dtrain doctor``; each ends within its time limit.

check.py    a check and its result; time limits
here.py     this machine: versions, CPU, memory, extras
place.py    a cluster: whether it answers, its versions, a local step on each worker
data.py     a store: whether it opens, one chunk read here and on the workers
"""
