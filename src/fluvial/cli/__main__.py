"""Run the command line with `python -m fluvial.cli`."""

from fluvial.cli import main

if __name__ == "__main__":
    main()
