"""Trackers by name, one a module: ``run.trackers = ["tensorboard"]`` is the class ``Tracker`` of `tensorboard`.

A new tracker is a new module here; nothing else changes. A module has ``PACKAGE``, the package that it imports inside
its functions, ``EXTRA``, the extra of dtrain that installs it, ``LOOK``, how to look at what it keeps, and the class
``Tracker``. An object of it is made without arguments and called with every event, in a thread of its own;
`dtrain.report.tracking` says how.
"""
