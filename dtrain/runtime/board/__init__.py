"""The page ``dtrain`` of Dask's dashboard. All of this folder travels to the scheduler by value.

state.py     messages and finished tasks -> what is shown, in bounded memory
plots.py     what is shown -> Bokeh documents
texts.py     the text of the page as HTML
mount.py     pages, panes and JSON -> the scheduler's web application, and out of it again
plugin.py    the plugin of the scheduler that feeds the first and mounts the others

A scheduler that was started by hand has Dask and perhaps Bokeh, but neither dtrain nor torch: nothing here imports
them.
"""
