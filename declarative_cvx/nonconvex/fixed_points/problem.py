"""Fixed points of a torch function of the user's own: deep equilibrium models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.fixed_points.function import irregular, solve_function
from declarative_cvx.nonconvex.fixed_points.iteration import ROUNDING
from declarative_cvx.nonconvex.fixed_points.precision import without_autocast
from declarative_cvx.nonconvex.fixed_points.probes import mixed
from declarative_cvx.nonconvex.fixed_points.settings import ON_IRREGULAR, Settings, check_solver
from declarative_cvx.nonconvex.fixed_points.solution import FixedPointSolution
from declarative_cvx.transforms import observed, transforming

# Relative residuals that functions of many operations can be expected to reach.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True, eq=False)
class FixedPointProblem:
    """Find x = f(x, u, ...) for each element of a batch.

    Parameters
    ----------
    function : callable or nn.Module
        From x, ``(batch, *shape)``, and any number of tensors, each (batch, ...), to the shape of
        x; a deterministic function of torch.func-differentiable operations, in which elements do
        not depend on each other. Its result may depend on further tensors that require gradients
        only if they are the parameters of a module.
    shape : tuple of int
        Of x for one element.
    parameters : mapping of str to tuple of int, optional
        Names and shapes of the further arguments for one element, None being any size. A
        `DeclarativeLayer` needs them, to know what is batched.
    tol : float, optional
        Relative residual, in the max norm, to reach; 1e-10 in float64, 1e-5 in float32.
    max_iters : int, optional
        Evaluations of f.
    method : {"auto", "picard", "anderson", "newton"}, optional
        Where to begin; see `solve_equilibrium`. Newton's method forms Jacobians of single elements,
        for states that are small enough.

    Examples
    --------
    >>> import torch
    >>> problem = FixedPointProblem(lambda x, u: torch.cos(x) * u, shape=(1,))
    >>> problem.solve(torch.ones(1, 1)).x
    tensor([[0.7391]])
    """

    function: Callable[..., Tensor] | nn.Module
    shape: tuple[int, ...]
    parameters: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    tol: float | None = None
    max_iters: int = 1000
    method: str = "auto"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SpecificationError(f"function must be callable, got {self.function!r}.")
        check_solver(self.tol, self.max_iters, self.method, ON_IRREGULAR[0])
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)
        if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
            raise SpecificationError(f"shape must be positive integers, got {self.shape!r}.")
        object.__setattr__(self, "shape", shape)
        for name, extents in self.parameters.items():
            good = all(extent is None or isinstance(extent, int) for extent in extents)
            if not good:
                raise SpecificationError(
                    f"parameters[{name!r}] is {extents!r}; a tuple of integers, or None for any "
                    "size, is expected."
                )

    def solve(
        self, *inputs: Tensor, start: Tensor | None = None, on_irregular: str = "warn"
    ) -> FixedPointSolution:
        """Solve for each element; failures do not raise.

        The derivative is that of the implicit function theorem, with respect to the inputs and,
        if the function is a module, its parameters; it can be differentiated again.

        Parameters
        ----------
        *inputs : Tensor
            Each with the batch dimension first.
        start : Tensor, shape ``(batch, *shape)``, optional
            Zeros if not given. Needed if there are no inputs.
        on_irregular : {"warn", "ignore", "raise"}, optional
            What to do in a backward pass at an element whose linear system is singular.

        Returns
        -------
        FixedPointSolution

        Raises
        ------
        ParameterError
            If shapes do not fit, or the function depends on tensors that would get no gradient.
        """
        check_solver(self.tol, self.max_iters, self.method, on_irregular)
        start = self._start(inputs, start)
        tol = TOLERANCE[start.dtype] if self.tol is None else self.tol
        reachable = ROUNDING * torch.finfo(start.dtype).eps
        if tol >= reachable or start.dtype == torch.float64:
            return self._solve(inputs, start, tol, on_irregular)
        wide = tuple(v.double() if v.is_floating_point() else v for v in inputs)
        found = self._solve(wide, start.double(), tol, on_irregular, wide=True)
        return replace(found, x=found.x.to(start.dtype))

    def _solve(
        self,
        inputs: tuple[Tensor, ...],
        start: Tensor,
        tol: float,
        on_irregular: str,
        wide: bool = False,
    ) -> FixedPointSolution:
        """With a module's parameters in float64, if `wide`."""
        function, arguments = _explicit(self.function, inputs, wide)
        self._check(function, start, arguments, wide)
        settings = Settings(tol, self.max_iters, self.method, on_irregular)
        with without_autocast(start.device):
            found = solve_function(function, start, arguments, settings)
            residual, iterations = observed(*found[1:])
            x = found[0]
            _require_apart(function, torch.where(x.isnan(), start, x), arguments, inputs)
            if not bool((residual <= tol).all()):
                x = self._without_unsolved(x, inputs, settings, wide)
        return FixedPointSolution(
            x,
            residual,
            iterations,
            tol,
            partial(torch.zeros_like, residual, dtype=torch.bool)
            if transforming()
            else partial(
                irregular, function, settings, found[0].detach(), [v.detach() for v in arguments]
            ),
        )

    def _without_unsolved(
        self, x: Tensor, inputs: tuple[Tensor, ...], settings: Settings, wide: bool
    ) -> Tensor:
        """The same x, of which no derivative passes through elements that were not solved.

        There the function may not be defined, and zero times NaN would reach what is shared. A
        solved element takes their place: from its solution, that costs one evaluation.
        """
        solved = ~x.detach().flatten(1).isnan().any(1)
        instead = torch.where(
            solved, torch.arange(len(x), device=x.device), solved.to(torch.int64).argmax()
        )
        function, arguments = _explicit(self.function, tuple(v[instead] for v in inputs), wide)
        if not bool(observed(solved)[0].any()):
            return x.detach() + sum(v.flatten()[:0].sum() for v in arguments)
        start = torch.where(solved.any(), x.detach()[instead], 0.0)
        again = solve_function(function, start, arguments, settings)[0]
        return torch.where(solved.reshape(-1, *[1] * (x.ndim - 1)), again, torch.nan)

    def _start(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> Tensor:
        """Where to start from, which also says how many elements there are, in which type."""
        given = [*inputs] if start is None else [start, *inputs]
        if not given:
            raise ParameterError("Without inputs a start is needed: start=..., (batch, *shape).")
        for position, value in enumerate(given):
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(given[0]):
                raise ParameterError(
                    f"Argument {position} is {_described(value)}; expected a tensor with the batch "
                    f"dimension first, as argument 0, {_described(given[0])}."
                )
        floating = [value for value in (*inputs, *given) if value.is_floating_point()]
        dtype = floating[0].dtype if floating else torch.get_default_dtype()
        if dtype not in TOLERANCE:
            raise ParameterError(f"The inputs are {dtype}; expected float32 or float64.")
        shape = (len(given[0]), *self.shape)
        if start is None:
            return torch.zeros(shape, dtype=dtype, device=given[0].device)
        if tuple(start.shape) != shape:
            raise ParameterError(f"start has shape {tuple(start.shape)}; expected {shape}.")
        return torch.where(start.isfinite(), start, 0.0).to(given[-1].device, dtype).detach()

    def _check(
        self,
        function: Callable[..., Tensor],
        start: Tensor,
        arguments: tuple[Tensor, ...],
        wide: bool,
    ) -> None:
        """Call the function once, with arguments that require no gradients."""
        copies = [argument.detach().clone() for argument in (start, *arguments)]
        versions = [_version(copy) for copy in copies]
        value = function(*copies) if not wide else self._in_float64(function, copies)
        if versions != [_version(copy) for copy in copies]:
            raise ParameterError(
                "The function writes into its arguments, which would change what it is given next. "
                "Compute new tensors (`x = x + u` instead of `x += u`)."
            )
        if (
            not isinstance(value, Tensor)
            or value.shape != start.shape
            or value.dtype != start.dtype
        ):
            raise ParameterError(
                f"The function returned {_described(value)} for an x of {_described(start)}; "
                "expected the same shape and type."
            )
        if value.requires_grad and not transforming():
            raise ParameterError(
                "The function depends on tensors that require gradients and are not among its "
                "inputs: they would get none. Pass them as inputs, or make the function an "
                "nn.Module with these as parameters."
            )

    def _in_float64(self, function: Callable[..., Tensor], values: list[Tensor]) -> Tensor:
        """The function's value, refused if it does not compute in float64."""
        problem = "it returned another type"
        try:
            value = function(*values)
            if value.dtype == torch.float64:
                return value
        except RuntimeError as error:
            problem = str(error)
        raise ParameterError(
            f"tol={self.tol} is less than float32 can reach, and the function does not compute in "
            f"float64 ({problem}). Ask for {TOLERANCE[torch.float32]}, or let constants in it have "
            "the type of its arguments."
        )


class FixedPointLayer(nn.Module):
    """`FixedPointProblem` as a module.

    Parameters
    ----------
    problem : FixedPointProblem
        If its function is a module, that is part of this one.
    on_failure : {"raise", "nan"}, optional
        What to do if an element is not solved: raise `SolveError`, or return NaN for it, with zero
        gradient.
    on_irregular : {"warn", "ignore", "raise"}, optional
    warm_start : bool, optional
        Start from the solution of the call before, if it had the same shape.
    """

    def __init__(
        self,
        problem: FixedPointProblem,
        *,
        on_failure: str = "raise",
        on_irregular: str = "warn",
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(problem, FixedPointProblem):
            raise SpecificationError(f"problem must be a FixedPointProblem, got {problem!r}.")
        check_failure(on_failure)
        check_solver(None, 1, "auto", on_irregular)
        self.problem, self.on_failure, self.on_irregular = problem, on_failure, on_irregular
        if isinstance(problem.function, nn.Module):
            self.function = problem.function
        self.warm = WarmStart(warm_start)

    @torch.compiler.disable
    def forward(self, *inputs: Tensor) -> Tensor:
        """The fixed points, ``(batch, *shape)``.

        Raises
        ------
        SolveError
            If an element is not solved and ``on_failure="raise"``.
        """
        solution = self.solve(*inputs)
        return solution.x if self.on_failure == "nan" else solution.require_solved().x

    @torch.compiler.disable
    def solve(self, *inputs: Tensor, start: Tensor | None = None) -> FixedPointSolution:
        """As calling the layer, but returning the full report; failures do not raise."""
        shape = (len(inputs[0]), *self.problem.shape) if inputs else None
        start = self.warm.start(shape) if start is None else start
        solution = self.problem.solve(*inputs, start=start, on_irregular=self.on_irregular)
        self.warm.keep(solution.x)
        return solution

    def extra_repr(self) -> str:
        return f"shape={self.problem.shape}, on_failure={self.on_failure!r}, {self.warm}"


@dataclass(eq=False)
class WarmStart:
    """The solution of the call before, if wanted."""

    enabled: bool
    _previous: Tensor | None = None

    def start(self, shape: tuple[int, ...] | None) -> Tensor | None:
        """What was kept, if it has the shape."""
        previous = self._previous
        fits = previous is not None and (shape is None or tuple(previous.shape) == shape)
        return previous if fits else None

    def keep(self, x: Tensor) -> None:
        if self.enabled and not transforming():
            self._previous = x.detach()

    def __repr__(self) -> str:
        return f"warm_start={self.enabled}"

    def __getstate__(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "_previous": None}


def check_failure(on_failure: str) -> None:
    """Refuse a choice that there is not.

    Raises
    ------
    SpecificationError
    """
    if on_failure not in ("raise", "nan"):
        raise SpecificationError(f"on_failure must be 'raise' or 'nan', got {on_failure!r}.")


def _explicit(
    function: Callable[..., Tensor] | nn.Module, inputs: tuple[Tensor, ...], wide: bool
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The function as one of x and what it can be differentiated by, and the latter.

    That is the inputs of floating-point numbers and a module's parameters, in float64 if `wide`.
    """
    module = function if isinstance(function, nn.Module) else None
    named = {} if module is None else _widened(module.named_parameters(), wide)
    buffers = _widened(module.named_buffers(), True) if module is not None and wide else {}
    places = [k for k, value in enumerate(inputs) if value.is_floating_point()]

    def call(x: Tensor, *arguments: Tensor) -> Tensor:
        given = list(inputs)
        for place, argument in zip(places, arguments, strict=False):
            given[place] = argument
        if module is None:
            return function(x, *given)
        values = dict(zip(named, arguments[len(places) :], strict=True))
        return torch.func.functional_call(module, {**buffers, **values}, (x, *given))

    return call, (*(inputs[place] for place in places), *named.values())


def _widened(named: Iterable[tuple[str, Tensor]], wide: bool) -> dict[str, Tensor]:
    return {
        name: value.double() if wide and value.is_floating_point() else value
        for name, value in named
    }


def _require_apart(
    function: Callable[..., Tensor],
    x: Tensor,
    arguments: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
) -> None:
    """Refuse functions in which elements of the batch depend on each other.

    Raises
    ------
    ParameterError
    """
    if transforming():
        return
    own = sum(value.is_floating_point() for value in inputs)
    held = [value.detach() for value in arguments]
    if mixed(lambda x, *each: function(x, *each, *held[own:]), x.detach(), held[:own]):
        raise ParameterError(
            "In the function elements of the batch depend on each other (such as by a mean over "
            "the batch, or batch normalisation in training mode), but fixed points are those of "
            "single elements. Make what they share one element, or an input of its own."
        )


def _version(value: Tensor) -> int:
    """How often the value was written to, as far as torch counts that."""
    return 0 if value.is_inference() else value._version


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"
