"""Layouts of Zarr stores whose groups say what their arrays mean: axes of images, columns of tables.

    find.py       which layout names an array's dimensions, and which array a group stands for: asks those below
    hierarchy.py  the groups of a store by their path; nothing is listed
    ome.py        OME-Zarr 0.1 to 0.5: the axes stand in the group's ``multiscales``
    sparse.py     sparse matrices (CSR, CSC) as AnnData writes them: three arrays in a group
    stored.py     what an array may stand for
    anndata.py    AnnData: the axes of X, layers, obs, var ...; categoricals are codes beside their names

A new layout is one file here, and a name in each function of `find` that concerns it.
"""
