"""The command `layerwise`."""


def main(argv: list[str]) -> None:
    """Run the command; `worker` starts without the rest of it."""
    if argv[:1] == ["worker"]:
        from layerwise.cli.worker import run

        run(argv[1:])
