"""The benchmark of the live stream: exchanges of turns between two processes over loopback."""
