"""From CVXPY problems to functions in torch."""
