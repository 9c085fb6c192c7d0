"""Entry of `python -m benchmarks.fedpipe`."""

from benchmarks.fedpipe.main import main

if __name__ == "__main__":
    main()
