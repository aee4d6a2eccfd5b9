"""A small model and real data for the demo, the notebook and the benchmarks."""
