"""One script per claim of the README; each writes JSON to benchmarks/results/."""
