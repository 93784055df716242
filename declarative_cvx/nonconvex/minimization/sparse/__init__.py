"""Sparse matrices of a batch with one pattern, and their factorisation, the batch innermost."""
