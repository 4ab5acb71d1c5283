"""What was found of the descent of a set of models: edges from parents to children, with what speaks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from weightspace.lineage.records import Claim
from weightspace.lineage.steps import Kind

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    "parent", "child", "kind", "share", "confidence", "direction", "undecided", "distance", "drift", "recorded", "why",
)  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """From ``parent`` to ``child``, found in the weights.

    ``kind`` is how the child was made and ``detail`` says it in words (see ``weightspace.lineage.steps``); ``share`` is
    the parent's part in a merge, 1 for an only parent. ``confidence`` is the probability of this parent among all that
    the child may have, or none, and ``direction`` that it is not the other way round. Networks that are equal, or equal
    up to symmetries, have no direction in their weights: ``undecided``, with ``direction`` 0.5, and in an order that
    records give, or else the list of models. ``distance`` is relative to the two norms (0 for equal, 1 for unrelated
    weights), ``drift`` how far outward the step led, per squared length.
    ``log10_p``: of the correlation of the two under the null that they are strangers. ``recorded``: "agrees",
    "disagrees" or "" where the child's file says nothing of its parents.
    """

    parent: str
    child: str
    kind: Kind
    detail: str
    share: float
    confidence: float
    direction: float
    distance: float
    drift: float
    log10_p: float
    why: str
    recorded: str = ""
    undecided: bool = False


@dataclass(frozen=True, eq=False)
class Lineage:
    """The forest of a set of models, as their weights tell it; ``print`` shows it as a tree.

    ``models``: every model, in order. ``edges``: parents to children. ``families``: sets of relatives, whether or not
    the parents of all are here. ``claims``: what the files say, and ``disagreements`` in sentences where that is not
    what the weights say. ``left_out``: models (and files of a zoo) that could not be compared or read, with the reason.
    ``notes``: how it was done.
    """

    models: tuple[str, ...]
    edges: tuple[Edge, ...]
    families: tuple[tuple[str, ...], ...]
    claims: tuple[Claim, ...] = ()
    disagreements: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def roots(self) -> tuple[str, ...]:
        """Models that have children here and no parent."""
        children, parents = {e.child for e in self.edges}, {e.parent for e in self.edges}
        return tuple(m for m in self.models if m in parents and m not in children)

    @property
    def strangers(self) -> tuple[str, ...]:
        """Models without any relative here."""
        related = {m for family in self.families if len(family) > 1 for m in family}
        related |= {m for e in self.edges for m in (e.parent, e.child)}
        return tuple(m for m in self.models if m not in related and m not in self.left_out)

    def parents(self, model: str) -> tuple[Edge, ...]:
        """The edges into a model: one, several of a merge, or none."""
        return tuple(e for e in self.edges if e.child == model)

    def children(self, model: str) -> tuple[Edge, ...]:
        """The edges out of a model."""
        return tuple(e for e in self.edges if e.parent == model)

    def ancestors(self, model: str) -> tuple[str, ...]:
        """All models above a model, nearest first."""
        above: dict[str, list[str]] = {}
        for e in self.edges:
            above.setdefault(e.child, []).append(e.parent)
        found = dict.fromkeys(above.get(model, ()))
        queue = list(found)
        for m in queue:
            queue.extend(p for p in above.get(m, ()) if p not in found)
            found |= dict.fromkeys(above.get(m, ()))
        return tuple(found)

    def family(self, model: str) -> tuple[str, ...]:
        """All relatives of a model, itself included."""
        return next((f for f in self.families if model in f), (model,))

    def table(self) -> pd.DataFrame:
        """One row per edge."""
        import pandas as pd

        return pd.DataFrame([{c: getattr(e, c) for c in _COLUMNS} for e in self.edges], columns=list(_COLUMNS))

    def to_json(self) -> dict[str, Any]:
        """Everything as values that ``json.dumps`` takes."""
        return {
            "models": list(self.models),
            "edges": [asdict(e) for e in self.edges],
            "families": [list(f) for f in self.families],
            "roots": list(self.roots),
            "strangers": list(self.strangers),
            "claims": [asdict(c) for c in self.claims],
            "disagreements": list(self.disagreements),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph``: a node per model (attribute ``family``), an edge per edge with all its facts."""
        import networkx as nx

        graph = nx.DiGraph()
        number = {m: i for i, f in enumerate(self.families) for m in f}
        for m in self.models:
            graph.add_node(m, family=number.get(m, -1), left_out=self.left_out.get(m, ""))
        for e in self.edges:
            graph.add_edge(e.parent, e.child, **{k: v for k, v in asdict(e).items() if k not in ("parent", "child")})
        return graph

    def tree(self) -> str:
        """The forest in lines, children below their parents."""
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return "\n".join([self.headline, *self._lines(), *self.remarks()])

    @property
    def headline(self) -> str:
        """How many models, families and edges, in a line."""
        families = sum(len(f) > 1 for f in self.families)
        merges = len({e.child for e in self.edges if e.kind == "merge"})
        said = f"{len(self.models)} models, {families} {'family' if families == 1 else 'families'}"
        said += f", {len(self.edges)} edge{'' if len(self.edges) == 1 else 's'}"
        said += f", {merges} merge{'' if merges == 1 else 's'}" if merges else ""
        parts = [said, f"{len(self.strangers)} without relatives"]
        return f"Lineage({'; '.join(parts)}; {self.seconds:.1f} s)"

    def remarks(self) -> list[str]:
        """Disagreements with what files say, and what was left out, a line each; of many the first."""
        lines = [f"  disagrees: {d}" for d in self.disagreements[:10]]
        if len(self.disagreements) > 10:
            lines.append(f"  … {len(self.disagreements) - 10} more disagreements")
        lines += [f"  left out {m}: {why}" for m, why in list(self.left_out.items())[:5]]
        if len(self.left_out) > 5:
            lines.append(f"  … {len(self.left_out) - 5} more left out")
        return lines

    def _lines(self) -> Iterator[str]:
        below: dict[str, list[Edge]] = {}
        for e in self.edges:
            below.setdefault(e.parent, []).append(e)
        first = {e.child: e for e in reversed(self.edges)}
        for root in self.roots:
            yield root
            stack = [(e, 1) for e in reversed(below.get(root, []))]
            while stack:
                edge, depth = stack.pop()
                share = f" {edge.share:.0%}" if edge.share < 0.999 else ""
                flag = " ≠ its record" if edge.recorded == "disagrees" else ""
                flag += ", direction undecided" if edge.undecided else ""
                yield f"{'   ' * (depth - 1)}└─ {edge.child}  [{edge.kind}{share}, {edge.confidence:.2f}{flag}]"
                # What follows a merge is shown below its first parent.
                if first[edge.child] is edge:
                    stack.extend((e, depth + 1) for e in reversed(below.get(edge.child, [])))
        for family in self.families:
            alone = [m for m in family if m not in first and m not in below]
            if len(family) > 1 and alone:
                shown = ", ".join(alone[:6]) + (f" and {len(alone) - 6} more" if len(alone) > 6 else "")
                yield f"relatives of {next((m for m in family if m in below), 'each other')}, parent not here: {shown}"


__all__ = ["Edge", "Lineage"]
