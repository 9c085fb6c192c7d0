"""Examples to read and run: a plain loop, a method and a codec of one's own."""
