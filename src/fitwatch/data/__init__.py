"""Batches and loaders: taking batches apart, sharing them among ranks, counting classes."""
