"""The `celo2` command: one row in a table per subcommand, each imported only when called."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from celo2_harness._version import __version__
from celo2_harness.lab.errors import InputError

_INSTALL = "pip install 'celo2-harness[cli,train]'"


class Command(NamedTuple):
    """A subcommand.

    Its module has a frozen dataclass `Config`, whose fields become the options, and `run(config) -> int`, which returns
    the exit status. It may have `defaults(config) -> Config` too: the options are then read a second time over what it
    returns, so that a resumed run keeps its own settings wherever no option says otherwise. And it may have `REGISTRY`,
    tyro's rules for fields that are written in a way of their own.

    Attributes:
        module: What to import.
        help: One line.
        needs: Packages of the extras that it cannot do without.
    """

    module: str
    help: str
    needs: tuple[str, ...] = ("tyro", "rich")


COMMANDS = {
    "train": Command(
        "celo2_harness.lab.cli.train",
        "Train a byte-level GPT on a text with one optimizer.",
        ("tyro", "rich", "matplotlib"),
    ),
    "compare": Command(
        "celo2_harness.lab.cli.compare",
        "Train the same GPT with several optimizers and compare them.",
        ("tyro", "rich", "matplotlib"),
    ),
    "evaluate": Command(
        "celo2_harness.lab.cli.evaluate", "Run a suite: tasks, optimizers, learning rates, weight decays and seeds."
    ),
    "report": Command(
        "celo2_harness.lab.cli.report",
        "Make tables, pictures and a page of results.",
        ("tyro", "rich", "matplotlib"),
    ),
    "describe": Command("celo2_harness.lab.cli.describe", "Show where a preset sends every parameter of a model."),
    "presets": Command("celo2_harness.lab.cli.presets", "List the presets."),
    "bench": Command("celo2_harness.lab.cli.bench", "Measure what an optimizer step costs."),
    "metatrain": Command(
        "celo2_harness.lab.cli.metatrain", "Learn a rule on small image tasks.", ("tyro", "rich", "matplotlib")
    ),
    "metatrain select": Command(
        "celo2_harness.lab.cli.metatrain_select", "Take the best evaluated rule of a meta-training run as its weights."
    ),
    "reinforce": Command(
        "celo2_harness.lab.cli.reinforce",
        "Train an agent on a game with PPO and one optimizer, or draw the returns of runs.",
        ("tyro", "rich", "matplotlib"),
    ),
    "data prepare": Command("celo2_harness.lab.cli.data", "Shrink image sets to 8x8 files for meta-training."),
    "data tokens": Command("celo2_harness.lab.cli.data_tokens", "Turn texts into token shards."),
    "weights": Command("celo2_harness.lab.cli.weights", "Show what a weight file holds, or convert it."),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        args: The words after `celo2`; those of the process by default.

    Returns:
        0 for done, 1 for a run that diverged, 2 for wrong input, 130 for an interruption.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"celo2-harness {__version__}")
        return 0
    # Two words name a command where the table has them.
    words = 2 if " ".join(args[:2]) in COMMANDS else 1
    name, options = " ".join(args[:words]), args[words:]
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    # Asked before any work: a missing plotting package should not show at the end of a long run.
    missing = [package for package in command.needs if importlib.util.find_spec(package) is None]
    if missing:
        return _fail(f"{name} needs {', '.join(missing)}: {_INSTALL}")
    try:
        return _run(name, importlib.import_module(command.module), options)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("celo2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output is gone, which is no error; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(error))


def _run(name: str, module: Any, options: list[str]) -> int:
    import tyro

    def parse(**default: Any) -> Any:
        return tyro.cli(
            module.Config,
            prog=f"celo2 {name}",
            args=options,
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=getattr(module, "REGISTRY", None),
            **default,
        )

    try:
        config = parse()
        if hasattr(module, "defaults"):
            config = parse(default=module.defaults(config))
    except SystemExit as stop:  # tyro has printed the help or what is wrong with the options.
        return stop.code if isinstance(stop.code, int) else 2
    return module.run(config)


def _fail(message: str) -> int:
    print(f"celo2: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        f"usage: celo2 COMMAND [OPTIONS]\n\nCelo2, a learned optimizer, and the harness around it.\n\n"
        f"commands:\n{rows}\n\n`celo2 COMMAND --help` shows the options of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
