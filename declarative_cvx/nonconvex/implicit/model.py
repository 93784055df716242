"""Implicit models as torch modules (IDL Sec. 2)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.fixed_points.problem import WarmStart, check_failure
from declarative_cvx.nonconvex.fixed_points.settings import check_solver
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    ActivationLike,
    Blocks,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.equilibrium import EquilibriumSolution, solve_certified
from declarative_cvx.nonconvex.implicit.parametrizations import (
    InfinityNorm,
    LowRank,
    Unconstrained,
)
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed


class ImplicitModel(nn.Module):
    """x = phi(A x + B u + b), y = C x + D u + c (IDL eq. 1), batch first.

    The weight of A that is trained is free; A is its projection onto a set of well-posed matrices,
    made once per call and differentiated, so that the constraint holds exactly after every step of
    any optimiser.

    Parameters
    ----------
    in_features, out_features, state_features : int
        p, q and n.
    activation : Activation, str, nn.Module or sequence of pairs (activation, size), optional
        phi.
    well_posed : WellPosed, optional
        The set of A; ``InfinityNorm(0.95)`` if not given, or `LowRank` if a rank is.
    bias : bool, optional
        Whether there are b and c.
    rank : int, optional
        Of A, in place of ``well_posed=LowRank(rank)``.
    tol, max_iters, method : optional
        As for `solve_equilibrium`.
    on_failure : {"raise", "nan"}, optional
        What `forward` does if an element is not solved: raise `SolveError`, or return NaN for it,
        with zero gradient.
    on_irregular : {"warn", "ignore", "raise"}, optional
        What to do in a backward pass at an element that lies on a kink of phi. The default is that
        of torch's own activations.
    warm_start : bool, optional
        Start from the states of the call before, if the inputs had the same shape.
    generator : torch.Generator, optional
        For the initial weights.
    device, dtype : optional

    Attributes
    ----------
    raw_A : Parameter
        The free weight of A; shaped as `well_posed` has it.
    B, C, D : Parameter, shapes (n, p), (q, n), (q, p)
    b, c : Parameter, shapes (n,) and (q,), or None

    Examples
    --------
    >>> import torch
    >>> model = ImplicitModel(4, 2, state_features=10)
    >>> model(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        state_features: int,
        activation: ActivationLike = "relu",
        well_posed: WellPosed | None = None,
        bias: bool = True,
        rank: int | None = None,
        *,
        tol: float | None = None,
        max_iters: int = 1000,
        method: str = "auto",
        on_failure: str = "raise",
        on_irregular: str = "ignore",
        warm_start: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        p, q, n = (
            _require_size(name, size)
            for name, size in (
                ("in_features", in_features),
                ("out_features", out_features),
                ("state_features", state_features),
            )
        )
        check_solver(tol, max_iters, method, on_irregular)
        check_failure(on_failure)
        self.activation, self.well_posed = as_activation(activation), _chosen(well_posed, rank)
        self.activation.check(n)
        self.well_posed.check(self.activation)
        self.in_features, self.out_features, self.state_features = p, q, n
        self.on_failure = on_failure
        self._options: dict[str, Any] = {
            "tol": tol,
            "max_iters": max_iters,
            "method": method,
            "on_irregular": on_irregular,
        }
        self._warm = WarmStart(warm_start)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.raw_A = nn.Parameter(self.well_posed.initial(n, generator=generator, **kind))
        self.B = nn.Parameter(torch.empty(n, p, **kind))
        self.C = nn.Parameter(torch.empty(q, n, **kind))
        self.D = nn.Parameter(torch.empty(q, p, **kind))
        self.b = nn.Parameter(torch.empty(n, **kind)) if bias else None
        self.c = nn.Parameter(torch.empty(q, **kind)) if bias else None
        self._reset_rest(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; those beside A as `torch.nn.Linear` does."""
        kind: dict[str, Any] = {"device": self.raw_A.device, "dtype": self.raw_A.dtype}
        self.raw_A.copy_(self.well_posed.initial(self.state_features, generator=generator, **kind))
        self._reset_rest(generator)

    @torch.no_grad()
    def _reset_rest(self, generator: torch.Generator | None) -> None:
        for weight, fan_in in (
            (self.B, self.in_features),
            (self.C, self.state_features),
            (self.D, self.in_features),
            (self.b, self.in_features),
            (self.c, self.state_features),
        ):
            if weight is not None:
                bound = 1 / math.sqrt(fan_in)
                weight.uniform_(-bound, bound, generator=generator)

    @classmethod
    def from_weights(
        cls,
        A: Tensor | ImplicitWeights,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        activation: ActivationLike | None = None,
        well_posed: WellPosed | None = None,
        **options: Any,
    ) -> ImplicitModel:
        """A model with given weights, exactly.

        Parameters
        ----------
        A, B, C, D : Tensor, shapes (n, n), (n, p), (q, n), (q, p)
            Or `ImplicitWeights` in the place of A, which hold all that is needed.
        b, c : Tensor, shapes (n,) and (q,), optional
            Both or neither.
        activation : optional
            "relu" if not given.
        well_posed : WellPosed, optional
            A set that A is in; all matrices if not given.
        **options
            As for the constructor.

        Raises
        ------
        ParameterError
            If shapes do not fit together, or A is not in the set.
        """
        rest = {"B": B, "C": C, "D": D, "b": b, "c": c, "activation": activation}
        bias = b is not None or isinstance(A, ImplicitWeights)
        weights = _record(A, rest).dense()
        well_posed = Unconstrained() if well_posed is None else well_posed
        kind: dict[str, Any] = {"device": weights.A.device, "dtype": weights.A.dtype}
        model = cls(
            weights.in_features, weights.out_features, weights.state_features,
            weights.activation, well_posed, bias=bias, **options, **kind,
        )  # fmt: skip
        model.load_weights(weights)
        return model

    @torch.no_grad()
    def load_weights(self, weights: ImplicitWeights) -> None:
        """Take over weights, exactly.

        Raises
        ------
        ParameterError
            If they do not fit, or A is not in the model's set, or the model's type holds fewer
            digits than theirs.
        """
        weights = weights.dense()
        self._check_type(weights.A.dtype)
        n = weights.state_features
        if n == self.state_features and _blocks(weights, n) != _blocks(self, n):
            raise ParameterError(
                f"The weights have the activation {weights.activation}, the model "
                f"{self.activation}."
            )
        raw = self.well_posed.right_inverse(weights.A.detach().to(self.raw_A))
        values = {"raw_A": raw, **{name: getattr(weights, name) for name in "BCDbc"}}
        for name, value in values.items():
            self._check_weight(name, value)
        for name, value in values.items():
            if (parameter := getattr(self, name)) is not None:
                parameter.copy_(value)

    def _check_type(self, dtype: torch.dtype) -> None:
        """Refuse weights that would be rounded."""
        own = self.raw_A.dtype
        if torch.promote_types(dtype, own) != own:
            raise ParameterError(
                f"The weights are {dtype}, the model is {own}, to which they would be rounded: "
                f"pass weights.to({own}), or make the model .to({dtype})."
            )

    def _check_weight(self, name: str, value: Tensor) -> None:
        """Refuse a weight that does not fit, before any is taken over."""
        parameter = getattr(self, name)
        if parameter is None:
            if bool(value.any()):
                raise ParameterError(f"The model has no {name}, but the weights have one.")
        elif parameter.shape != value.shape:
            raise ParameterError(
                f"{name} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}."
            )

    @property
    def A(self) -> Tensor:
        """The matrix that is used, (n, n); computed from `raw_A` when asked for."""
        return self.well_posed.matrix(self.raw_A)

    @property
    def weights(self) -> ImplicitWeights:
        """All numbers of the model, attached to its parameters; zeros for absent biases."""
        b = self.B.new_zeros(self.state_features) if self.b is None else self.b
        c = self.C.new_zeros(self.out_features) if self.c is None else self.c
        return ImplicitWeights(self.A, self.B, self.C, self.D, b, c, self.activation)

    def forward(self, u: Tensor) -> Tensor:
        """The output y, (..., q), for inputs (..., p).

        Raises
        ------
        ParameterError
        SolveError
            If an element is not solved and ``on_failure="raise"``.
        """
        solution = self.solve(u)
        if self.on_failure == "raise":
            solution.require_solved()
        return solution.y

    @torch.compiler.disable  # looks at values: torch.compile breaks its graph here
    def solve(self, u: Tensor, start: Tensor | None = None) -> EquilibriumSolution:
        """States, outputs and a report per element; failures do not raise.

        Parameters
        ----------
        u : Tensor, shape (..., p)
        start : Tensor, shape (..., n), optional
            Where to start from.
        """
        self._check(u)
        if isinstance(self.well_posed, LowRank):
            A: Any = self.well_posed.factors(self.raw_A)
        else:
            A = self.A
        drive = nn.functional.linear(u, self.B, self.b)
        start = self._warm.start(tuple(drive.shape)) if start is None else start
        certified = not isinstance(self.well_posed, Unconstrained)
        found = solve_certified(
            A, drive, self.activation, start=start, certified=certified, **self._options
        )
        self._warm.keep(found.x)
        y = nn.functional.linear(found.x, self.C, self.c) + nn.functional.linear(u, self.D)
        return replace(found, y=y)

    def _check(self, u: Tensor) -> None:
        if not isinstance(u, Tensor) or u.ndim == 0 or u.shape[-1] != self.in_features:
            found = f"shape {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise ParameterError(f"u has {found}; expected (..., {self.in_features}).")
        if u.device != self.B.device:
            raise ParameterError(
                f"u is on {u.device}, but the model is on {self.B.device}; put both on one device."
            )
        mixed = torch.is_autocast_enabled(u.device.type)
        if u.dtype != self.B.dtype and not (mixed and u.is_floating_point()):
            raise ParameterError(
                f"u has type {u.dtype}, but the model {self.B.dtype}: pass u.to({self.B.dtype})."
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"state_features={self.state_features}, activation={self.activation}, "
            f"well_posed={self.well_posed}, bias={self.b is not None}"
        )


def _blocks(rule: ImplicitWeights | ImplicitModel, n: int) -> Activation:
    """The activation in the one form that equal ones have."""
    return Blocks([(rule.activation, n)]).take(range(n))


def _record(A: Tensor | ImplicitWeights, rest: dict[str, Any]) -> ImplicitWeights:
    """The weights as one record, which A may be already."""
    given = [name for name, value in rest.items() if value is not None]
    if isinstance(A, ImplicitWeights):
        if given:
            raise ParameterError(f"ImplicitWeights hold {', '.join(given)} already.")
        return A
    for name in "BCD":
        if rest[name] is None:
            raise ParameterError(f"{name} is missing: pass A, B, C and D, or ImplicitWeights.")
    if ("b" in given) != ("c" in given):
        raise ParameterError("Pass both biases b and c, or neither.")
    if "activation" not in given:
        rest = {**rest, "activation": "relu"}
    if "b" not in given:
        rest = {**rest, "b": A.new_zeros(len(A)), "c": A.new_zeros(len(rest["C"]))}
    return ImplicitWeights(A, **rest)


def _require_size(name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SpecificationError(f"{name} must be a positive integer, got {size!r}.")
    return size


def _chosen(well_posed: WellPosed | None, rank: int | None) -> WellPosed:
    """The set that is meant."""
    if well_posed is None:
        return InfinityNorm(0.95) if rank is None else LowRank(rank)
    if not isinstance(well_posed, WellPosed):
        raise SpecificationError(f"well_posed must be a WellPosed set, got {well_posed!r}.")
    if rank is not None and getattr(well_posed, "rank", None) != rank:
        raise SpecificationError(
            f"rank={rank} does not go with well_posed={well_posed}: pass LowRank({rank}, kappa)."
        )
    return well_posed
