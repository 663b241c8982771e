"""A trained model for others: files that need no dtrain, with normalisation inside, compared with the run's model.

module.py    the module: decoded values -> model -> outputs in the target's units
trial.py     real samples of the run, as they are decoded and as the run's model sees them
formats/     one format a file: write, load, how to use it
card.py      the model card beside the file
export.py    the steps: build, write, load, compare, move into place
"""
