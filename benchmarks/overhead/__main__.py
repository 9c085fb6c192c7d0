"""Entry of `python -m benchmarks.overhead`."""

from benchmarks.overhead.costs import main

if __name__ == "__main__":
    main()
