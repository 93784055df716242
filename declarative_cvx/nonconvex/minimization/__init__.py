"""Local minima of smooth programs, batched, and their derivatives."""
