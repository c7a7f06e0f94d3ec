"""A program that depends on celo2-harness; it must pass pyright and mypy in strict mode."""
