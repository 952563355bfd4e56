"""The command `layerwise`."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments (default: those of the process), and end the process with its exit status.

    A worker starts without the rest of the command, which would take longer than many of the workers' jobs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["worker"]:
        from layerwise.cli.warm_worker import hand_over
        from layerwise.cli.worker import run

        hand_over(arguments[1:])
        run(arguments[1:])
    else:
        from layerwise.cli.app import app

        app(arguments)
