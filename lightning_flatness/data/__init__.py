"""Batches, samples and whose they are."""
