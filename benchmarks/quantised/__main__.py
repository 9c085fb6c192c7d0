"""Entry of `python -m benchmarks.quantised`."""

from benchmarks.quantised.main import main

if __name__ == "__main__":
    main()
