"""Speed and memory against the peers, in one run: `make bench`."""
