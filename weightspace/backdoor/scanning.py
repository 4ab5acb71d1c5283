"""One network: what is seen of it, and the verdict on that."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weightspace.backdoor.differences import CHANGE_TESTS
from weightspace.backdoor.evidence import CLASS_TESTS, Evidence, evidence
from weightspace.backdoor.head import Facts, relative
from weightspace.backdoor.outputs import class_axis
from weightspace.backdoor.questions import Asked
from weightspace.backdoor.stamps import STAMP_NUMBERS
from weightspace.backdoor.subnets import separation
from weightspace.backdoor.verdict import Verdict
from weightspace.errors import WeightspaceError
from weightspace.graph import ParameterGraph
from weightspace.paths import write_whole
from weightspace.pretrained.applicability import Applicability
from weightspace.pretrained.views import canonical, clean, described

if TYPE_CHECKING:
    from weightspace.backdoor.null import Null
    from weightspace.backdoor.shipped import Detector
    from weightspace.backdoor.training import Names
    from weightspace.wiring.wiring import Wiring


WHOLE = (
    "channel_isolation", "channel_leading", "channel_lipschitz", "gap_largest", "word_outlier", "conductance",
    *STAMP_NUMBERS,
)  # fmt: skip
"""Statistics of whole networks that are read; 0 where one cannot be made."""
VERSION = 2
"""Of what is kept of evidence: to be raised when a test changes and its name does not."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What the heads read of a network: its graph at the canonical point, its classes' cell, it itself, evidence.

    ``p_value`` and ``target`` (class) of the untrained tests; ``found``: all of them, where they were made just now.
    """

    graph: ParameterGraph
    cell: str
    asked: Asked
    facts: Facts
    names: Names
    p_value: float
    target: int
    found: Evidence | None = None


def observe(
    tensors: Mapping[str, Tensor], wiring: Wiring, cache: Path | None = None, tests: bool = True
) -> Observed:  # fmt: skip
    """What is seen of a network without its base or inputs; evidence is kept in ``cache`` where given.

    Without ``tests`` there is none, for heads that read none. Raises ``WeightspaceError`` where the network has no
    class axis, or weights that are not finite.
    """
    tensors = completed(tensors, wiring)
    axis = class_axis(wiring, tensors)
    plain = clean(tensors, wiring)
    (graph,) = canonical([plain])
    cell = next(c.name for c in graph.cells.values() if c.factors == (axis.factor,))
    # In an order that the file does not decide.
    lain = {n: tensors[n] for n in sorted(tensors)}
    file = None if cache is None else cache / f"{_key(plain)}.json"
    kept: dict[str, Any]
    found: Evidence | None = None
    if not tests:
        kept = {"names": [[], []], "classes": [[]] * axis.classes, "whole": [], "p_value": 1.0, "target": 0,
                "responses": [[]] * axis.classes}  # fmt: skip
    elif file is not None and file.is_file():
        kept = json.loads(file.read_bytes())
    else:
        found = evidence(wiring, lain)
        kept = _kept(found, separation(wiring, lain).conductance)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(kept).encode())
    descriptor = described([graph])[0].numpy() if tests else np.zeros(0)
    classes, whole, responses = (np.array(kept[k], dtype=np.float64) for k in ("classes", "whole", "responses"))
    facts = Facts(classes, whole, descriptor, responses, frame_of(wiring))
    names = (tuple(kept["names"][0]), tuple(kept["names"][1]))
    asked = Asked(wiring, lain, axis)
    return Observed(graph, cell, asked, facts, names, kept["p_value"], kept["target"], found)


def frame_of(wiring: Wiring) -> int:
    """A number of what a network is built of: the shape of its inputs, how many tensors it has of each role."""
    assert wiring.program is not None, "networks with a class axis can be run"
    shapes = [tuple(x.shape[1:]) for x in wiring.program.args if isinstance(x, Tensor)]
    counts = Counter(str(role) for role in wiring.roles.values())
    return int(hashlib.sha256(repr((shapes, sorted(counts.items()))).encode()).hexdigest()[:15], 16)


def completed(tensors: Mapping[str, Tensor], wiring: Wiring) -> dict[str, Tensor]:
    """The tensors in float32, with those that the program takes and a sample leaves out: counters, no weights."""
    held = {n: tensors[n] for n in tensors}
    if wiring.program is not None:
        held |= {n: t for n, t in wiring.program.tensors.items() if n not in held and not t.is_floating_point()}
    return {n: t.float() if t.is_floating_point() else t for n, t in held.items()}


def _kept(found: Evidence, conductance: float) -> dict[str, Any]:
    """What is read of evidence, as JSON can hold it."""
    # What compares a network with its base is no part of what is learned.
    tests = [n for n in found.names if n not in CHANGE_TESTS]
    whole = {**found.whole, "conductance": conductance}
    whole |= {f"p_{n}": float(np.log10(p)) for n, p in found.p_values.items()}
    known = [*WHOLE, *(f"p_{n}" for n in tests)]
    columns = [found.names.index(n) for n in tests]
    return {
        "names": [tests, known], "classes": np.asarray(found.values)[:, columns].tolist(),
        "whole": [float(whole.get(n, 0.0)) for n in known], "p_value": float(found.p_value),
        "target": int(found.target[0]),
        "responses": [[float(f"{x:.4g}") for x in row] for row in found.responses.tolist()],
    }  # fmt: skip


def _key(graph: ParameterGraph) -> str:
    """Hash of the weights and their wiring's program, so that evidence of the same network is found again."""
    digest = hashlib.sha256()
    wiring = graph.wiring
    assert wiring is not None
    digest.update(repr((VERSION, CLASS_TESTS, WHOLE)).encode())
    digest.update(repr([(n, wiring.roles.get(n)) for n in graph.shapes]).encode())
    digest.update(repr(sorted(wiring.activations.items())).encode())
    for name in graph.shapes:
        digest.update(graph.tensor(name).contiguous().numpy().tobytes())
    return digest.hexdigest()[:40]


# ------------------------------------------------------------------------------------ the verdict


def scan_one(
    tensors: Mapping[str, Tensor], path: str, known: Detector, *, base: Any = None, siblings: Sequence[Any] = (),
    inputs: Tensor | None = None, labels: Tensor | None = None, null: Null | None = None, wiring: Wiring | None = None,
    level: float = 0.05,
) -> Verdict:  # fmt: skip
    """The verdict on one model's tensors; ``options`` are those of ``scan``.

    Raises ``WeightspaceError`` where it cannot be scanned: no wiring, none that is proved, no classes, weights that
    are not finite.
    """
    if wiring is None:
        from weightspace.wiring.entry import wiring as find

        wiring = find(tensors)
    held = completed(tensors, wiring)
    seen = observe(held, wiring)
    applicability = applies(known, seen)
    strong = None
    if base is not None or siblings or inputs is not None:
        strong = _stronger(held, wiring, seen, base, siblings, inputs)
    right = None if inputs is None or labels is None else _accuracy(seen.asked, inputs, labels)
    p = known.untrained(seen.p_value) if null is None else null.judge(seen.found or evidence(wiring, held)).p_value
    if strong is not None:
        # The better of two tests, paid for (Bonferroni).
        p = min(1.0, 2 * min(p, strong.p_value))
    probability, odds, flagged, targets = None, 0.0, p <= level, _by_tests(seen, strong)
    if applicability.inside:
        said = known.read([seen])
        odds = float(said.odds[0])
        probability = float(known.stack.probability(said.heads)[0])
        flagged = bool(known.flags(said.odds, level)[0])
        targets = ranked(said.classes[0])
    if strong is not None and strong.p_value <= level / 5:
        flagged = True
    reason = in_words(seen, strong, odds, flagged, applicability, targets, known)
    if right is not None:
        reason += f"; it answers {right:.0%} of the inputs as they are labelled"
    return Verdict(
        path=path, probability=probability, p_value=float(p), flagged=flagged, targets=targets,
        applicable=applicability.inside, reason=reason,
        applicability=applicability, prior=known.stack.prior, level=level, detector=known.name,
        calibration={k: float(known.figures[k]) for k in ("ece", "brier", "networks") if k in known.figures},
        evidence=dict(zip(seen.names[1], map(float, seen.facts.whole), strict=True)),
    )  # fmt: skip


def applies(known: Detector, seen: Observed) -> Applicability:
    """Whether a network is like those that the detector was trained on."""
    if known.tests not in (((), ()), seen.names):
        return Applicability(False, 0.0, f"{known.name} was made with other tests than this version of weightspace has")
    if reason := known.range.limits.excluded(seen.graph):
        return Applicability(False, 0.0, reason)
    descriptor = seen.facts.descriptor
    view = torch.from_numpy(descriptor)[None] if len(descriptor) else described([seen.graph])
    return known.range.of([known.projection(view)])


def ranked(odds: Any) -> tuple[tuple[int, float], ...]:
    """Classes and their shares of the suspicion, the most suspect first, of log odds ``(K,)``."""
    share = np.exp(odds - odds.max())
    share /= share.sum()
    return tuple((int(k), round(float(share[k]), 6)) for k in np.argsort(-share, kind="stable"))


def in_words(
    seen: Observed, strong: Evidence | None, odds: float, flagged: bool, where: Applicability,
    targets: Sequence[tuple[int, float]], known: Detector,
) -> str:  # fmt: skip
    """The verdict in a sentence or two: what stands out, and by how much."""
    z = relative(seen.facts.classes)[:, : seen.facts.classes.shape[1]]
    if not targets:
        return "nothing was said of its classes"
    first = targets[0][0]
    order = np.argsort(-z[first])[:2]
    tests = " and ".join(f"{WORDS.get(seen.names[0][k], seen.names[0][k])} ({z[first, k]:.1f})" for k in order)
    if where.inside:
        share = float(known.rarity(np.array([odds]))[0])
        few = "hardly any clean network looks as suspect"
        said = f"of clean networks {share:.0%} look as suspect" if share > 0.005 else few
    else:
        said = "judged by untrained tests"
    if flagged:
        out = f"class {first} stands out by {tests}, in robust deviations; {said}"
    else:
        out = f"no class stands out enough; {said}"
    if strong is not None:
        out += f"; with what was given beside it p = {strong.p_value:.2g}, class {strong.target[0]}"
    return out


WORDS: Mapping[str, str] = {
    "row_sum": "the sum of its last weights", "row_norm": "the length of its last weights",
    "row_positive": "the positive part of its last weights", "row_largest": "its largest last weight",
    "row_apart": "the direction of its last weights", "bias": "its bias",
    "path_sum": "the sum of its paths", "path_norm": "the length of its paths", "path_largest": "its largest path",
    "share_sum": "its share of the paths", "share_norm": "its share of the paths' length",
    "share_largest": "its share of the largest paths",
    "noise_mean": "its logit on noise", "noise_share": "how often noise is taken for it",
    "noise_std": "how its logit varies on noise", "margin": "the largest margin reached",
    "margin_mean": "the mean margin reached", "universal": "one small change that leads to it from everywhere",
    "patch": "one small patch that leads to it from everywhere", "word_rise": "a word that leads to it",
    "word_gap": "a word far ahead of others", "word_least": "a word that leads to it from everywhere",
}  # fmt: skip
"""The tests of classes in words."""


def _by_tests(seen: Observed, strong: Evidence | None) -> tuple[tuple[int, float], ...]:
    """Classes by untrained tests: the one they point at, the others by how far they stand out."""
    if strong is not None:
        order = list(strong.target)
    else:
        z = relative(seen.facts.classes)[:, : seen.facts.classes.shape[1]]
        best = np.argsort(-np.sort(z, 1)[:, -3:].mean(1), kind="stable")
        order = [seen.target, *(int(k) for k in best if int(k) != seen.target)]
    weight = [0.5**k for k in range(len(order))]
    return tuple((int(k), round(w / sum(weight), 6)) for k, w in zip(order, weight, strict=True))


def _stronger(
    tensors: Mapping[str, Tensor], wiring: Wiring, seen: Observed, base: Any, siblings: Sequence[Any],
    inputs: Tensor | None,
) -> Evidence:  # fmt: skip
    """Evidence with all that was given, of the weights as they are: a base lies where they do."""
    return evidence(
        wiring, tensors, base=None if base is None else _loaded(base, tensors),
        siblings=tuple(_loaded(s, tensors) for s in siblings), inputs=inputs,
    )  # fmt: skip


def _accuracy(asked: Asked, inputs: Tensor, labels: Tensor) -> float:
    """Share of the inputs that the network answers as they are labelled: inputs of another scale would show here."""
    program = asked.wiring.program
    if labels.shape != (len(inputs),):
        raise WeightspaceError(f"{len(inputs)} inputs and labels of shape {tuple(labels.shape)}; one each was expected")
    assert program is not None, "networks with a class axis can be run"
    with torch.no_grad():
        said = asked.axis.logits(program.run(asked.tensors, inputs, *program.args[1:], **dict(program.kwargs)))
    return float((said.argmax(1) == labels).double().mean())


def _loaded(x: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a base or sibling. Raises ``WeightspaceError`` where they are not those of the network."""
    from weightspace.backdoor.verdict import opened

    found = opened(x)
    other = [n for n in like if n not in found or tuple(found[n].shape) != tuple(like[n].shape)]
    if other:
        raise WeightspaceError(
            f"the base or sibling {getattr(found, 'path', '')} has no tensor {other[0]!r} of shape "
            f"{tuple(like[other[0]].shape)}; one with the tensors of the scanned model was expected"
        )
    return {n: found[n] for n in like}


__all__ = ["WORDS", "Observed", "applies", "frame_of", "observe", "ranked", "scan_one"]
