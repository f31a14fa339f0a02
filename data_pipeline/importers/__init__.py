"""Readers of published data sets: each writes the same shards as the embedded data set."""
