"""The benchmark of overhead: start-up, time and memory for each site and round."""
