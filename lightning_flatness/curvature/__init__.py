"""How the curvature of a network is obtained from a recorded forward pass."""
