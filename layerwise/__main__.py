"""`python -m layerwise`: the command, and the workers that the rules of the workflow call."""

from layerwise.cli import main

if __name__ == "__main__":
    main()
