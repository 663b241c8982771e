r"""The mathematics of a round. Nothing in this folder knows Zarr or Dask; everything is a function of its arguments.

Replicas :math:`k = 1 \dots M` are logical: M is a setting of the run, not the number of workers. A round:

    local    theta_k, inner_k'  =  H inner-optimizer steps from theta on partition k, from cursor_k      local.py
    mix      theta'             =  sum_k n_k theta_k / sum_k n_k                                         mix.py
    evaluate val_loss, metrics of theta', as sums that merge                                             evaluate.py

n_k are the samples that replica k consumed in the round. `plan.py` says what each replica does in a round,
`params.py` how a module's state becomes one flat array.

References
----------
FedAvg: McMahan et al. 2017, arXiv:1602.05629. Local SGD: Stich 2019, arXiv:1805.09767.
"""
