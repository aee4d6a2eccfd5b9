"""Batches and samples, and which process measures them."""
