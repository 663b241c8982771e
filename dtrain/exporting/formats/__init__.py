"""Formats by name, one a module: ``--to pt2`` is `pt2`. A new format is a new module here; nothing else changes.

A module has ``PACKAGES``, what it imports inside its functions, ``EXTRA``, the extra of dtrain that installs them,
``SUFFIX``, how the name of a file must end (empty for any), ``TOLERANCE``, the largest difference between outputs of
the file and of the module, relative to the largest output, and the functions ``write``, ``load`` and ``usage``.
"""
