"""The order in which the nodes of a sparse symmetric matrix are eliminated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Nodes of a complete rest from which on it is factorised as a dense matrix.
_DENSE = 4


@dataclass(frozen=True)
class Ordering:
    """Rounds of independent nodes, and a rest in which each node is connected to all others.

    Attributes
    ----------
    rounds : list of list of (int, list of int)
        Nodes, and those that each is connected to when it is eliminated.
    rest : list of int
    """

    rounds: list[list[tuple[int, list[int]]]]
    rest: list[int]

    @property
    def products(self) -> int:
        """Multiplications of a factorisation."""
        columns = (len(below) for members in self.rounds for _, below in members)
        return sum(c * (c + 3) // 2 for c in columns) + len(self.rest) ** 3 // 6


def neighbours(nodes: int, pairs: Iterable[tuple[int, int]]) -> list[set[int]]:
    """The graph of a symmetric matrix."""
    graph: list[set[int]] = [set() for _ in range(nodes)]
    for i, j in pairs:
        if i != j:
            graph[i].add(j)
            graph[j].add(i)
    return graph


def eliminate(graph: list[set[int]], slack: float, most: float) -> Ordering | None:
    """Minimum degree, many nodes at a time; None if that takes more than so many products.

    Nodes of a round do not touch each other, so they are eliminated at once; the more slack there
    is in what counts as a small degree, the fewer rounds there are, and the more fill. Chains so
    get about the logarithm of their length, as by cyclic reduction.
    """
    graph = [set(found) for found in graph]
    left = set(range(len(graph)))
    rounds: list[list[tuple[int, list[int]]]] = []
    products = 0
    while left:
        least = min(len(graph[node]) for node in left)
        if least == len(left) - 1 >= _DENSE - 1:
            break
        chosen = _independent(graph, left, slack * least + 1)
        members = [(node, sorted(graph[node])) for node in chosen]
        products += sum(len(below) ** 2 for _, below in members) // 2
        if products > most:
            return None
        for node, below in members:
            _remove(graph, node, below)
        left.difference_update(chosen)
        rounds.append(members)
    found = Ordering(rounds, sorted(left))
    return found if found.products <= most else None


def _independent(graph: list[set[int]], left: set[int], largest: float) -> list[int]:
    """Nodes of small degree that do not touch each other, smallest degrees first."""
    candidates = sorted((len(graph[v]), v) for v in left if len(graph[v]) <= largest)
    blocked: set[int] = set()
    chosen = []
    for _, node in candidates:
        if node not in blocked:
            chosen.append(node)
            blocked |= graph[node]
    return chosen


def _remove(graph: list[set[int]], node: int, below: list[int]) -> None:
    """Eliminate a node: those that it touches then touch each other."""
    clique = set(below)
    for other in below:
        graph[other] |= clique
        graph[other] -= {node, other}
