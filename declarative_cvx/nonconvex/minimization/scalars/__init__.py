"""Functions taken apart into scalars, so that sparse derivatives of a batch cost few operations."""
