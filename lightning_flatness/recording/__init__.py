"""Records what a network does after a convolution. Knows torch's dispatcher and hooks, nothing of flatness."""
