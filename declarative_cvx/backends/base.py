"""What a solver of cone programs is: options, capabilities, and one method.

Adding a solver: one file with a frozen dataclass deriving from `Backend` (or from
`ElementwiseBackend` for solvers of one problem at a time), and one line in `backends.table`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np

from declarative_cvx.errors import BackendError, MissingBackendError, nearest
from declarative_cvx.host import HostProgram
from declarative_cvx.program import Structure
from declarative_cvx.status import Status

# Tolerance near rounding, which interior-point methods reach in a few iterations more.
SHARPEST = 1e-12


@dataclass(frozen=True)
class Capabilities:
    """What a solver can take, as data.

    Attributes
    ----------
    cones : frozenset of str
        Kinds of cone, out of `declarative_cvx.cones.KINDS`.
    quadratic : bool
        Whether a quadratic objective stays one; otherwise it is rewritten with a second-order
        cone before the solver sees it.
    batched : bool
        Whether one call solves a batch natively.
    warm_start : bool
        Whether it can start from a given point.
    devices : tuple of str
        Where it computes.
    package, licence : str
        Name on PyPI and licence of the package.
    """

    cones: frozenset[str]
    quadratic: bool
    batched: bool
    warm_start: bool
    devices: tuple[str, ...]
    package: str
    licence: str


@dataclass(frozen=True)
class Answer:
    """What a solver returned for a batch, in the row order of `Cone`, not yet verified.

    Attributes
    ----------
    x : ndarray, shape (batch, n)
    y, s : ndarray, shape (batch, m)
        Where the status is INFEASIBLE, y is the certificate; where UNBOUNDED, x is.
    status : list of Status
        Translation of the solver's words.
    said : list of str
        The solver's words.
    iterations : list of int
    """

    x: np.ndarray
    y: np.ndarray
    s: np.ndarray
    status: list[Status]
    said: list[str]
    iterations: list[int]

    @property
    def codes(self) -> np.ndarray:
        """The statuses as numbers, int64, shape (batch,)."""
        return np.array(self.status, dtype=np.int64)

    @classmethod
    def failure(cls, program: HostProgram, said: str) -> Answer:
        """The answer of a solver that raised an error on a whole batch."""
        batch = program.batch
        return cls(
            x=np.full_like(program.q, np.nan),
            y=np.full_like(program.b, np.nan),
            s=np.full_like(program.b, np.nan),
            status=[Status.NUMERICAL_ERROR] * batch,
            said=[said] * batch,
            iterations=[0] * batch,
        )


@dataclass(frozen=True)
class Point:
    """Where to start: x (batch, n), y and s (batch, m); rows of NaN mean a cold start."""

    x: np.ndarray
    y: np.ndarray
    s: np.ndarray


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and float(value) > 0


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """A solver with its options.

    Attributes
    ----------
    tol : float
        Accuracy asked of the solver, by its own measure.
    max_iters : int or None
        Iteration limit; None is the solver's own default.
    time_limit : float or None
        Seconds per problem; None is no limit.
    verbose : bool
        Let the solver print its log.
    refine : bool
        Polish the solver's answer by Newton steps. False keeps it as it comes, still verified: to
        compare solvers by.
    settings : mapping
        Further options by the solver's own names.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    aliases: ClassVar[Mapping[str, str]] = {}

    tol: float = 1e-8
    max_iters: int | None = None
    time_limit: float | None = None
    verbose: bool = False
    refine: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = [option.name for option in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise BackendError(
                    f"{cls.__name__} has no option {option!r}. {nearest(option, known)} Options "
                    "by the solver's own names go into settings={...}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.require_installed()
        if not _is_positive(self.tol):
            raise self.refusal(f"tol must be a positive number, got {self.tol!r}")
        limit = self.max_iters
        if limit is not None and not (isinstance(limit, Integral) and limit >= 1):
            raise self.refusal(f"max_iters must be an integer of at least 1, got {limit!r}")
        if self.time_limit is not None and not _is_positive(self.time_limit):
            raise self.refusal(
                f"time_limit must be a positive number of seconds, got {self.time_limit!r}"
            )
        native = self.native_settings() if self.settings else frozenset()
        for option in self.settings:
            if option not in native:
                raise self.refusal(f"no setting {option!r}. {nearest(option, native)}")

    @classmethod
    def refusal(cls, reason: str) -> BackendError:
        """The error that names this solver and what is wrong with its options."""
        return BackendError(f"{cls.name}: {reason.rstrip('.')}.")

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the solver's package can be imported."""
        return importlib.util.find_spec(cls.capabilities.package) is not None

    @classmethod
    def how_to_install(cls) -> str:
        """The command that installs what is missing."""
        return f"pip install {cls.capabilities.package}"

    @classmethod
    def require_installed(cls) -> None:
        """Raise `MissingBackendError` with the command that installs the package."""
        if not cls.is_installed():
            raise MissingBackendError(
                f"Solver {cls.name} needs the package {cls.capabilities.package!r}, which is not "
                f"installed: {cls.how_to_install()}"
            )

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> Self:
        """Build from a flat dictionary of options: fields, aliases and the solver's own names."""
        known = {option.name for option in dataclasses.fields(cls)}
        fields: dict[str, Any] = {}
        settings: dict[str, Any] = dict(options.get("settings", {}))
        for option, value in options.items():
            option = cls.aliases.get(option, option)
            if option in known and option != "settings":
                fields[option] = value
            elif option != "settings":
                settings[option] = value
        cls.require_installed()
        native = cls.native_settings()
        for option in settings:
            if option not in native:
                everything = known | set(cls.aliases) | set(native)
                raise cls.refusal(f"unknown option {option!r}. {nearest(option, everything)}")
        return cls(**fields, settings=settings)

    def changed(self, options: Mapping[str, Any]) -> Self:
        """The same solver with some options changed, named as in `configured`."""
        if not options:
            return self
        fields = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        return type(self).configured({**fields, **options})

    @classmethod
    @abstractmethod
    def native_settings(cls) -> frozenset[str]:
        """Names that `settings` may hold."""

    def obstacle(self, structure: Structure) -> str | None:
        """Why the solver cannot take programs of this structure; None if it can."""
        missing = structure.cone.kinds - self.capabilities.cones
        if missing:
            return (
                f"{self.name} has no {' or '.join(sorted(missing))} cone, which this problem needs"
            )
        return None

    def stages(self, structure: Structure) -> tuple[Backend, ...]:
        """The methods that this choice stands for, in the order in which they are tried."""
        return (self,)

    def sharpened(self) -> Backend | None:
        """The same method asked for accuracy near rounding; None if it seldom gets there."""
        return None

    @abstractmethod
    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        """Solve every element of a batch.

        Parameters
        ----------
        program : HostProgram
            One for which `obstacle` is None.
        start : Point, optional
            Used by solvers that can start from a point.

        Returns
        -------
        Answer
        """
