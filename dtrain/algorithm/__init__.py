r"""The mathematics of a round. This folder knows neither Zarr nor Dask; everything is a function of its arguments.

Replicas :math:`k = 1 \dots M` are logical: M is a setting of the run, not the number of workers. A round:

    local      theta_k, state_k'  =  H inner-optimizer steps from theta on partition k, from cursor_k    local.py
    contribute update_k           =  theta_k, or with a codec Enc(theta - theta_k + e_k)       average.py, codec.py
    mix        mean               =  sum_k n_k theta_k / sum_k n_k over a neighbourhood       mix.py, reduce.py
    outer      theta', outer'     =  OuterOptimizer(theta, theta - mean), if there is one                outer.py
    evaluate   val_loss, metrics of theta', as sums that merge                                           evaluate.py

n_k are the samples that replica k consumed in the round. `plan.py` plans the rounds, `params.py` turns a module's
state into one flat array, `replica.py` an optimizer's state, `recipe.py` names into functions.

References
----------
FedAvg: McMahan et al. 2017, arXiv:1602.05629. Local SGD: Stich 2019, arXiv:1805.09767.
"""
