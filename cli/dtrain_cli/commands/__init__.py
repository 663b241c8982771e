"""The commands, one a module. A new command is a new module here; nothing else changes.

A module has ``app``, a Typer app that holds the command, and ``ORDER``, its place in ``dtrain --help``. Modules are
imported to print the help, so they import dtrain and other slow packages inside their functions.
"""
