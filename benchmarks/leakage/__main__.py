"""Entry of `python -m benchmarks.leakage`."""

from benchmarks.leakage.curve import main

if __name__ == "__main__":
    main()
