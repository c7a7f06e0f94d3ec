"""The `celo2` command. Thin: every subcommand reads its options and calls the package."""

from celo2_harness.cli.main import main as main
