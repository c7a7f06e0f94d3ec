"""What makes and judges rules: tasks, training, suites, meta-training, benchmarks and the `celo2` command."""
