import numpy as np

def exponential(
    dim: int,
    threads: int,
    points: np.ndarray,
    projection: np.ndarray,
    vectors: np.ndarray,
    values: np.ndarray,
    kink: np.ndarray,
    /,
) -> None: ...
def second_order(
    dim: int,
    threads: int,
    points: np.ndarray,
    projection: np.ndarray,
    vectors: np.ndarray,
    values: np.ndarray,
    kink: np.ndarray,
    /,
) -> None: ...
def semidefinite(
    order: int,
    threads: int,
    eigenvalues: np.ndarray,
    eigenvectors: np.ndarray,
    vectors: np.ndarray,
    values: np.ndarray,
    /,
) -> None: ...
