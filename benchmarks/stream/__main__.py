"""Entry of `python -m benchmarks.stream`."""

from benchmarks.stream.exchanges import main

if __name__ == "__main__":
    main()
