"""Functions that cannot be minimised, or would be differentiated wrongly, are refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from declarative_cvx.errors import DeclarativeError, SpecificationError
from declarative_cvx.nonconvex.minimization.evaluation import graph, mapped
from declarative_cvx.nonconvex.minimization.program import Function, NonlinearProgram, Parameters
from declarative_cvx.transforms import followed, observed

# Relative difference by which a value may change with the size of a batch: that is rounding.
_ROUNDING = 1e-8
_ADVICE = " What torch.func.vmap does not support can be written for a batch: batched=True."


def checked_functions(program: NonlinearProgram, x: Tensor) -> NonlinearProgram:
    """The program, with its number of equalities, if its functions are what they should be.

    Parameters
    ----------
    program : NonlinearProgram
    x : Tensor, shape (batch, n)
        Where they are looked at: for one element, and, if they take batches, for two.

    Raises
    ------
    SpecificationError
        If one of them fails, returns something of the wrong shape or type, uses a tensor that
        requires a gradient and is no parameter, or mixes the elements of a batch.
    """
    if program.separated is not None:
        return program  # known by all of its scalars
    x, *values = observed(x, *program.parameters)
    parameters, rows = tuple(values), {}
    for name in ("objective", "equality", "inequality"):
        function = getattr(program, name)
        if function is not None:
            found = _checked(program, name, function, x, parameters)
            rows[name] = found.shape[1:].numel()
    return replace(program, equalities=rows.get("equality"))


def _checked(
    program: NonlinearProgram, name: str, function: Function, x: Tensor, parameters: Parameters
) -> Tensor:
    first = tuple(value[:1] for value in parameters)
    found = _called(program, name, function, x[:1], first)
    _require_tensor(name, found)
    _require_shape(name, found, program.batched)
    if followed(found):
        raise SpecificationError(
            f"the {name} function uses a tensor that requires a gradient and is none of its "
            "arguments, so that no gradient would reach it. Make it a parameter of the problem (a "
            "torch.nn.Module's own parameters are, if the module itself is the function), or "
            "detach it."
        )
    if program.batched:
        _require_independence(program, name, function, x, parameters, found)
    return found


def _called(
    program: NonlinearProgram, name: str, function: Function, x: Tensor, parameters: Parameters
) -> Tensor:
    x, parameters = x.clone(), tuple(value.clone() for value in parameters)
    versions = [value._version for value in (x, *parameters)]
    with graph():
        try:
            found = mapped(program, function, x, parameters)
        except DeclarativeError:
            raise
        except Exception as error:
            kind = f"a batch of {len(x)}" if program.batched else "one element"
            advice = _ADVICE if "vmap" in str(error) else ""
            raise SpecificationError(
                f"the {name} function, called with float64 tensors for {kind}, raises "
                f"{type(error).__name__}: {error}{advice}"
            ) from error
    if versions != [value._version for value in (x, *parameters)]:
        raise SpecificationError(
            f"the {name} function writes into its arguments, which would change what it is given "
            "next. Compute new tensors (`x = x + p` instead of `x += p`)."
        )
    return found


def _require_tensor(name: str, found: Tensor) -> None:
    if not isinstance(found, Tensor) or found.dtype != torch.float64:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise SpecificationError(
            f"the {name} function returns {kind}, but a tensor of float64, the type of its "
            "arguments, is expected: convert constants, not results."
        )


def _require_shape(name: str, found: Tensor, batched: bool) -> None:
    vector = name != "objective"
    if found.dim() == 1 + vector and len(found) == 1:
        return
    shape = tuple(found.shape if batched else found.shape[1:])
    kind, advice = ("vector", "flatten or stack it") if vector else ("number", "sum or average it")
    expected = "(k,)" if vector else "()"
    if batched:
        expected = f"(batch, {'k' if vector else ''}), here of a batch of 1".replace(", )", ",)")
        advice += ", but keep the first dimension"
    raise SpecificationError(
        f"the {name} function returns a tensor of shape {shape}, but a {kind} for each element, of "
        f"shape {expected}, is expected: {advice}."
    )


def _require_independence(
    program: NonlinearProgram,
    name: str,
    function: Function,
    x: Tensor,
    parameters: Parameters,
    alone: Tensor,
) -> None:
    """The first element's value may not change when another one stands beside it."""
    other = x[1:2] if len(x) > 1 else x[:1]
    pair = torch.cat([x[:1], other + 0.1 * (1 + other.abs())])
    beside = _called(program, name, function, pair, tuple(value[:2] for value in parameters))
    _require_tensor(name, beside)
    if beside.shape != (2, *alone.shape[1:]):
        raise SpecificationError(
            f"the {name} function returns a tensor of shape {tuple(beside.shape)} for a batch of "
            f"2, and {tuple(alone.shape)} for one of 1: the first dimension is to be the batch."
        )
    near = torch.isclose(beside[:1], alone, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True)
    if not bool(near.all()):
        raise SpecificationError(
            f"the {name} function gives an element another value when a second one stands beside "
            "it: its elements depend on each other, or it is random. Sum over an element's own "
            "entries, not over the batch."
        )
