"""Whether x = phi(A x + b) has one solution for every b, and why (IDL 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    ActivationLike,
    Blocks,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.certificate import Certificate
from declarative_cvx.nonconvex.implicit.diagonal_lmi import lyapunov_scaling, monotone_scaling
from declarative_cvx.nonconvex.implicit.perron_frobenius import perron_scaling
from declarative_cvx.nonconvex.implicit.triangular_form import TriangularForm, triangular_form
from declarative_cvx.nonconvex.kernels.arguments import require

# What a number must be below 1 by, in units of rounding times the order.
MARGIN = 10.0

_NORMS = {
    math.inf: Certificate.INFINITY_NORM,
    1: Certificate.ONE_NORM,
    2: Certificate.SPECTRAL_NORM,
}


@dataclass(frozen=True, eq=False)
class WellPosedness:
    """The outcome of `is_well_posed`; true if there is a certificate.

    Attributes
    ----------
    certificate : Certificate or None
        Which condition holds; a string, such as "infinity norm". With None nothing is known, but
        for what `detail` says.
    detail : str
        The condition with its numbers; without a certificate, how far each one is from holding.
    value : float
        The number that the condition bounds, below 1: a norm, a diagonal entry; NaN without
        certificate.
    scaling : Tensor, shape (n,), or None
        d of the scaled matrix diag(d) l A diag(d)^-1 whose infinity norm (Perron-Frobenius) or
        2-norm (diagonal Lyapunov) is `value`; for the monotone condition I less its symmetric part
        is positive definite. S = diag(d)^2.
    permutation : Tensor of int, shape (n,), or None
        Order p of the states in which A[p][:, p] is (block) lower triangular, if A is so.
    blocks : tuple of int
        Sizes of the diagonal blocks after the permutation; (n,) if A is irreducible.
    parts : tuple of WellPosedness
        The certificates of those blocks, where they are what the answer rests on.
    """

    certificate: Certificate | None
    detail: str
    value: float = math.nan
    scaling: Tensor | None = None
    permutation: Tensor | None = None
    blocks: tuple[int, ...] = ()
    parts: tuple[WellPosedness, ...] = ()

    def __bool__(self) -> bool:
        return self.certificate is not None


def is_well_posed(A: Tensor, activation: ActivationLike = "relu") -> WellPosedness:
    """Look for a reason why x = phi(A x + b) has exactly one solution for every b.

    Tried in turn, in double precision, the cheap ones first: strictly triangular after a
    permutation; the norms inf, 1 and 2; Perron-Frobenius; and for each irreducible diagonal block
    (IDL Theorem 1) these and a single state with l A_ii < 1, the diagonal Lyapunov inequality
    and that of monotone operators. Every number is verified here, whoever computed it.

    Parameters
    ----------
    A : Tensor, shape (n, n)
        Dense or sparse.
    activation : Activation or its name
        Its Lipschitz constants l scale the conditions. Maps of the whole vector need a norm in
        which they are non-expansive, or a block triangular A that leaves them whole.

    Returns
    -------
    WellPosedness

    Raises
    ------
    ParameterError
        If A is not square, not of a floating type, or has an entry that is not finite.

    Notes
    -----
    The conditions are sufficient, not necessary, but for triangular matrices and ReLU, for which
    A_ii < 1 is necessary too. The linear matrix inequalities take seconds for n = 80 and about a
    minute for n = 160; they are reached only if all the others fail.

    Examples
    --------
    >>> report = is_well_posed(torch.tensor([[0.5, 0.0], [30.0, -2.0]]))
    >>> bool(report), str(report.certificate)
    (True, 'triangular')
    """
    phi = as_activation(activation)
    _check(A)
    n = A.shape[0]
    if n:
        phi.check(n)
    like = torch.empty(n, dtype=torch.float64)
    M = scipy.sparse.diags_array(phi.lipschitz_constants(like).numpy()) @ _sparse(A)
    form = triangular_form(M.tocsr(), phi.groups(n) if n else ())
    return _on_device(_decide(M.tocsr(), phi, form), form, A)


def _check(A: Tensor) -> None:
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.is_floating_point():
        raise ParameterError(
            f"A has shape {tuple(A.shape)} and type {A.dtype}; expected floating point, (n, n)."
        )
    require("A", A if A.layout == torch.strided else A.to_sparse_coo().coalesce().values())


def _sparse(A: Tensor) -> scipy.sparse.csr_array:
    """A in double precision, without stored zeros."""
    A = A.detach().to("cpu", torch.float64)
    if A.layout == torch.strided:
        return scipy.sparse.csr_array(A.numpy())
    A = A.to_sparse_coo().coalesce()
    out = scipy.sparse.csr_array((A.values().numpy(), A.indices().numpy()), shape=tuple(A.shape))
    out.eliminate_zeros()
    return out


def _decide(M: scipy.sparse.csr_array, phi: Activation, form: TriangularForm) -> WellPosedness:
    """The certificate of M = l A for a phi with Lipschitz constant 1, in its triangular form."""
    if not any(form.coupled):
        return _granted(Certificate.STRICTLY_TRIANGULAR, 0.0)
    dense = M.toarray()
    if len(form.blocks) == 1:
        return _first(_attempts(dense, phi), dense, phi)
    for attempt in _norms(dense, phi):
        if found := attempt():
            return found
    return _by_blocks(dense, phi, form)


def _by_blocks(M: np.ndarray, phi: Activation, form: TriangularForm) -> WellPosedness:
    """Theorem 1: the certificates of all diagonal blocks."""
    whole, parts = Blocks([(phi, len(M))]), []
    for states, coupled in zip(form.blocks, form.coupled, strict=True):
        if not coupled:
            parts.append(_granted(Certificate.STRICTLY_TRIANGULAR, 0.0))
            continue
        block, part = M[np.ix_(states, states)], whole.take(states.tolist())
        parts.append(_first(_attempts(block, part), block, part))
        if not parts[-1]:
            return _refused(f"States {_listed(states)}: {parts[-1].detail}")
    triangular = phi.monotone and all(len(states) == 1 for states in form.blocks)
    kind = Certificate.TRIANGULAR if triangular else Certificate.BLOCK_TRIANGULAR
    return replace(_granted(kind, max(part.value for part in parts)), parts=tuple(parts))


Attempt = Callable[[], WellPosedness | None]


def _attempts(M: np.ndarray, phi: Activation) -> Iterator[Attempt]:
    """Everything that can be tried with an irreducible block, the cheap things first."""
    if phi.monotone and len(M) == 1:
        yield partial(_below_one, Certificate.TRIANGULAR, float(M[0, 0]), 1)
    yield from _norms(M, phi)
    if phi.componentwise and len(M) > 1:
        yield partial(_lyapunov, M)
    if phi.monotone and len(M) > 1:
        yield partial(_monotone, M)


def _first(attempts: Iterator[Attempt], M: np.ndarray, phi: Activation) -> WellPosedness:
    """The first attempt that succeeds, or an account of how far from it they are."""
    for attempt in attempts:
        if found := attempt():
            return found
    return _refused(_shortfall(M, phi))


def _norms(M: np.ndarray, phi: Activation) -> Iterator[Attempt]:
    for p, kind in _NORMS.items():
        if p in phi.norms:
            yield partial(_normed, kind, M, p)
    if phi.componentwise:
        yield partial(_perron_frobenius, M)


def _normed(kind: Certificate, M: np.ndarray, p: float) -> WellPosedness | None:
    return _below_one(kind, float(np.linalg.norm(M, p)), len(M))


def _perron_frobenius(M: np.ndarray) -> WellPosedness | None:
    d = perron_scaling(torch.from_numpy(M))
    return None if d is None else _scaled(Certificate.PERRON_FROBENIUS, M, d.numpy(), math.inf)


def _lyapunov(M: np.ndarray) -> WellPosedness | None:
    d = lyapunov_scaling(M)
    return None if d is None else _scaled(Certificate.DIAGONAL_LYAPUNOV, M, d, 2)


def _scaled(kind: Certificate, M: np.ndarray, d: np.ndarray, p: float) -> WellPosedness | None:
    norm = float(np.linalg.norm(_similar(M, d), p))
    return _below_one(kind, norm, len(M), torch.from_numpy(d / d.max()))


def _monotone(M: np.ndarray) -> WellPosedness | None:
    d = monotone_scaling(M)
    if d is None:
        return None
    N = _similar(M, d)
    size = 1 + float(np.linalg.norm(N, 2))
    largest = float(np.linalg.eigvalsh((N + N.T) / 2)[-1])
    return _below_one(Certificate.MONOTONE, largest, len(M) * size, torch.from_numpy(d / d.max()))


def _similar(M: np.ndarray, d: np.ndarray) -> np.ndarray:
    return d[:, None] * M / d


def _below_one(
    kind: Certificate, value: float, order: float, scaling: Tensor | None = None
) -> WellPosedness | None:
    certain = value < 1 - MARGIN * order * np.finfo(float).eps
    return _granted(kind, value, scaling) if certain else None


def _granted(kind: Certificate, value: float, scaling: Tensor | None = None) -> WellPosedness:
    return WellPosedness(kind, f"{kind.condition}: {value:.6g}", value, scaling)


def _refused(detail: str) -> WellPosedness:
    return WellPosedness(None, detail)


def _shortfall(M: np.ndarray, phi: Activation) -> str:
    if len(M) == 1 and phi.monotone:
        verdict = "; for ReLU A is certainly ill-posed (IDL 3.1)" if phi.name == "relu" else ""
        return f"l A_ii = {M[0, 0]:.6g} is not below 1{verdict}."
    norms = ", ".join(f"||l A||_{p:g} = {np.linalg.norm(M, p):.6g}" for p in phi.norms)
    if not phi.componentwise:
        return f"{norms}: none is below 1, and {phi.name} is not componentwise."
    radius = max(abs(np.linalg.eigvals(abs(M))))
    return f"{norms}, rho(|l A|) = {radius:.6g}: none is below 1, and no diagonal S was found."


def _listed(states: np.ndarray) -> str:
    shown = ", ".join(map(str, states[:8].tolist()))
    return shown + (f", ... ({len(states)} in all)" if len(states) > 8 else "")


def _on_device(found: WellPosedness, form: TriangularForm, A: Tensor) -> WellPosedness:
    """With the triangular form, and tensors where A is."""
    order = None
    if len(form.blocks) > 1 or not any(form.coupled):
        order = torch.from_numpy(form.order).to(A.device, torch.int64)
    sizes = tuple(len(states) for states in form.blocks)
    parts = tuple(_moved(part, A) for part in found.parts)
    return replace(_moved(found, A), permutation=order, blocks=sizes, parts=parts)


def _moved(found: WellPosedness, A: Tensor) -> WellPosedness:
    if found.scaling is None:
        return found
    return replace(found, scaling=found.scaling.to(A.device, A.dtype))
