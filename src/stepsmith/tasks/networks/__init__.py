"""Optimizees of the papers, one family a file."""
