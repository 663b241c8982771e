"""Which samples are read, by whom, in which order and in how much memory: pure arithmetic on metadata, numpy only."""
