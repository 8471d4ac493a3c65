"""Machinery shared by the demo, the end-to-end tests and the benchmarks; one module per thing it knows."""
