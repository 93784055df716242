"""Tensors of scalars, on which torch functions run to be taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.scalars.forms import ZERO, NotSeparableError, Scalars

aten = torch.ops.aten


class Symbols(torch.Tensor):
    """A tensor each of whose entries is a form.

    Operations that only move entries about are those of the tensor of the forms' numbers; as zero
    has the number zero, this includes padding and triangles. Arithmetic makes new forms. Any other
    operation raises `NotSeparableError`.

    Attributes
    ----------
    scalars : Scalars
    numbers : Tensor of int64
        Of the forms.
    """

    scalars: Scalars
    numbers: Tensor

    @staticmethod
    def __new__(cls, scalars: Scalars, numbers: Tensor) -> Symbols:
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=torch.float64
        )

    def __init__(self, scalars: Scalars, numbers: Tensor) -> None:
        self.scalars = scalars
        self.numbers = numbers

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Symbols(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        scalars = next(leaf.scalars for leaf in _leaves(args) if isinstance(leaf, Symbols))
        packet, kwargs = function.overloadpacket, kwargs or {}
        if packet in _MOVING:
            return _moved(scalars, function, args, kwargs)
        if packet not in _RULES:
            raise NotSeparableError(f"{packet} has no rule for scalars")
        given = [_numbers(scalars, v) if isinstance(v, Tensor) else v for v in args]
        return Symbols(scalars, _RULES[packet](scalars, *given, **kwargs))

    @property
    def forms(self) -> list[int]:
        """The numbers of all entries, in C order."""
        return self.numbers.reshape(-1).tolist()


def _leaves(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (arg if isinstance(arg, list | tuple) else (arg,))]


def _numbers(scalars: Scalars, value: Tensor) -> Tensor:
    """The forms of a tensor's entries, those of constants too."""
    if isinstance(value, Symbols):
        return value.numbers
    entries = [scalars.constant(v) for v in value.detach().double().reshape(-1).tolist()]
    return torch.tensor(entries, dtype=torch.int64).reshape(value.shape)


# --- operations that move entries --------------------------------------------------------------

_MOVING = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.select,
    aten.slice, aten.index, aten.index_select, aten.gather, aten.cat, aten.stack, aten.expand,
    aten.unsqueeze, aten.squeeze, aten.constant_pad_nd, aten.diagonal, aten.flip, aten.roll,
    aten.repeat, aten.clone, aten.detach, aten.alias, aten.split, aten.unbind, aten.tril, aten.triu,
    aten.new_zeros, aten.zeros_like, aten.copy_, aten.diag_embed, aten.split_with_sizes,
    aten.as_strided, aten.movedim, aten.lift_fresh,
}  # fmt: skip


def _moved(scalars: Scalars, function: Any, args: Any, kwargs: Any) -> Any:
    """The same operation on the forms' numbers; floating-point tensors are constants."""

    def number(leaf: Any) -> Any:
        if isinstance(leaf, list | tuple):
            return type(leaf)(number(v) for v in leaf)
        known = isinstance(leaf, Symbols) or (isinstance(leaf, Tensor) and leaf.is_floating_point())
        return _numbers(scalars, leaf) if known else leaf

    args = [number(arg) for arg in args]
    if function.overloadpacket is aten.constant_pad_nd and len(args) > 2:
        args[2] = scalars.constant(float(args[2]))
    found = function(*args, **{key: v for key, v in kwargs.items() if key != "dtype"})
    if isinstance(found, list | tuple):
        return [Symbols(scalars, part) for part in found]
    return Symbols(scalars, found)


# --- arithmetic ----------------------------------------------------------------------------------


def _entrywise(rule: Callable[..., int]) -> Callable[..., Tensor]:
    """A rule of scalars on tensors that broadcast; numbers among the arguments are constants."""

    def apply(scalars: Scalars, *values: Any) -> Tensor:
        tensors = [
            v if isinstance(v, Tensor) else torch.tensor(scalars.constant(float(v))) for v in values
        ]
        tensors = list(torch.broadcast_tensors(*tensors))
        columns = zip(*(t.reshape(-1).tolist() for t in tensors), strict=True)
        return _tensor([rule(scalars, *entries) for entries in columns], tensors[0].shape)

    return apply


def _tensor(numbers: list[int], shape: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).reshape(shape)


def _of_one(name: str, exponent: float = 0.0) -> Callable[..., Tensor]:
    return _entrywise(lambda scalars, x: scalars.apply(name, x, exponent))


def _quotient(scalars: Scalars, a: int, b: int) -> int:
    value = scalars.value(b)
    if value is not None and value != 0.0:
        return scalars.scale(a, 1 / value)
    return scalars.multiply(a, scalars.apply("pow", b, -1.0))


def _add(scalars: Scalars, a: Any, b: Any, alpha: float = 1.0) -> Tensor:
    rule = _entrywise(lambda s, a, b: s.total(a, s.scale(b, float(alpha))))
    return rule(scalars, a, b)


def _hypotenuse(scalars: Scalars, a: int, b: int) -> int:
    squares = scalars.total(scalars.multiply(a, a), scalars.multiply(b, b))
    return scalars.apply("pow", squares, 0.5)


def _power(scalars: Scalars, base: Any, exponent: Any) -> Tensor:
    def rule(scalars: Scalars, x: int, k: int) -> int:
        value = scalars.value(k)
        if value is None:
            raise NotSeparableError("an exponent is not constant")
        return scalars.apply("pow", x, value)

    return _entrywise(rule)(scalars, base, exponent)


def _sum(scalars: Scalars, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = [d % x.dim() for d in (dims or range(x.dim()))] if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in dims]
    rows = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1)
    found = _over_last(scalars, rows)
    if keepdim:
        return found.reshape([1 if d in dims else size for d, size in enumerate(x.shape)])
    return found


def _over_last(scalars: Scalars, rows: Tensor) -> Tensor:
    if not rows.shape[-1]:
        return torch.full(rows.shape[:-1], ZERO)
    flat = rows.reshape(-1, rows.shape[-1]).tolist()
    return _tensor([scalars.total(*row) for row in flat], rows.shape[:-1])


def _mean(scalars: Scalars, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    total = _sum(scalars, x, dims, keepdim)
    share = total.numel() / max(x.numel(), 1)
    return _entrywise(lambda s, a: s.scale(a, share))(scalars, total)


def _product(scalars: Scalars, a: Tensor, b: Tensor) -> Tensor:
    """Of matrices and vectors, as torch.matmul."""
    left = a[None] if a.dim() == 1 else a
    right = b[:, None] if b.dim() == 1 else b
    terms = _entrywise(Scalars.multiply)(
        scalars, left.unsqueeze(-2), right.transpose(-1, -2).unsqueeze(-3)
    )
    found = _over_last(scalars, terms)
    found = found[..., 0, :] if a.dim() == 1 else found
    return found[..., 0] if b.dim() == 1 else found


def _running_sum(scalars: Scalars, x: Tensor, dim: int, **_: Any) -> Tensor:
    columns = x.movedim(dim, 0)
    total, rows = torch.zeros_like(columns[0]), []
    for column in columns:
        total = _add(scalars, total, column)
        rows.append(total)
    return torch.stack(rows).movedim(0, dim)


_RULES: dict[Any, Callable[..., Tensor]] = {
    aten.add: _add,
    aten.sub: lambda s, a, b, alpha=1.0: _add(s, a, b, -alpha),
    aten.rsub: lambda s, a, b, alpha=1.0: _add(s, b, a, -alpha),
    aten.neg: _entrywise(lambda s, x: s.scale(x, -1.0)),
    aten.mul: _entrywise(Scalars.multiply),
    aten.div: _entrywise(_quotient),
    aten.pow: _power,
    aten.hypot: _entrywise(_hypotenuse),
    aten.square: _of_one("pow", 2.0),
    aten.sqrt: _of_one("pow", 0.5),
    aten.rsqrt: _of_one("pow", -0.5),
    aten.reciprocal: _of_one("pow", -1.0),
    aten.sum: _sum,
    aten.mean: _mean,
    aten.cumsum: _running_sum,
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten.matmul), _product),
    aten.ones_like: lambda s, x, **_: torch.full_like(x, s.constant(1.0)),
    aten.softplus: lambda s, x, beta=1, threshold=20: _of_one("softplus")(s, x),
    aten.special_entr: _of_one("entr"),
    **{
        getattr(aten, name): _of_one(name)
        for name in (
            "exp", "expm1", "log", "log1p", "abs", "sign", "sigmoid", "erf", "sin", "cos", "tan",
            "sinh", "cosh", "tanh", "asinh", "atanh",
        )
    },
}  # fmt: skip
