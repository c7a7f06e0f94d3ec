"""The `celo2` command, whose function is `celo2_harness.lab.cli.main.main`. Thin: subcommands read options, no logic.

Nothing is imported here: `python -m celo2_harness.lab.cli.main` would find its module loaded already, and warn.
"""
