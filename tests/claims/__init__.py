"""Claims of the papers, and ours, at small scale and within a band."""
