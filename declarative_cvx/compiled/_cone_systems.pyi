import numpy as np

def solve(
    batch: int,
    n: int,
    m: int,
    columns: int,
    transpose: bool,
    threads: int,
    P: np.ndarray,
    A: np.ndarray,
    diagonal: np.ndarray,
    parts: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...],
    rhs: np.ndarray,
    solution: np.ndarray,
    free: np.ndarray,
    doubtful: np.ndarray,
    /,
) -> None: ...
