"""The benchmark of the secure channel: seal and open, beside a copy in memory and other ciphers."""
