"""Entry of `python -m benchmarks.fedcybgd`."""

from benchmarks.fedcybgd.losses import main

if __name__ == "__main__":
    main()
