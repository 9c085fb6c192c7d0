"""Entry of `python -m benchmarks.activations`."""

from benchmarks.activations.coding import main

if __name__ == "__main__":
    main()
