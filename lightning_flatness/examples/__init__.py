"""Small real models and data for the demo, the notebooks and the benchmarks."""
