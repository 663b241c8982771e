"""The models of the benchmarks of averaging, apart from the scripts: dtrain sends the modules beside a model."""
