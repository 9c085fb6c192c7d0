"""Entry of `python -m benchmarks.channel`."""

from benchmarks.channel.throughput import main

if __name__ == "__main__":
    main()
