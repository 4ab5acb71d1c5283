"""The model card of the pretrained detector: what it was made from, how good it is, what it cannot see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from weightspace.backdoor.shipped import HEADS, Detector

LIMITS = """\
- It has seen small classifiers of 2 to 10 classes, trained in minutes on small images and short texts. Networks unlike
  those are said to be outside its range, and judged by the training-free p-value alone.
- Attacks of a kind that it was not trained on are found less often; see the table of unseen attacks, which
  `python tests/benchmarks/backdoor_detection.py FOLDER` prints. An attacker who knows the detector can train against
  it.
- It cannot see a backdoor that changes nothing in how the network treats inputs near those it probes with: triggers of
  several conditions, backdoors planted cryptographically (Goldwasser et al. 2022) or in the program around the weights.
- Classes are compared with the same class of the clean training networks that a network is most like. Which one that is
  goes by number unless made-up pictures are answered as if they were in another order; with two classes, or words, by
  number alone. What those networks were not trained on (other data for as many classes) may look odd for that.
- All-to-all backdoors have no target class: no class stands out, and few were there to learn from.
- A class that the training data favoured, or one that is told by a small mark (a watermark), looks like a target. A
  flag is a reason to look closer, no proof.
- The probability holds at the share of poisoned networks it was trained with; of downloads far fewer are poisoned.
  `Verdict.at(0.01)` converts it.
"""


def model_card(detector: Detector, failed: int, left: Mapping[str, str]) -> str:
    """Markdown. ``failed``: networks whose attack did not work, which were left out; ``left``: those not read."""
    f = detector.figures
    limits = detector.range.limits
    attacks = [(k, str(v)) for k, v in sorted(f["attacks"].items(), key=lambda kv: (kv[0] != "clean", kv[0]))]
    lines = [
        "# The pretrained backdoor detector",
        "",
        f"`{detector.name}`, made by `weightspace train backdoor`. It is behind `ws.scan` and `weightspace scan`.",
        "",
        "## What it was made from",
        "",
        f"{f['networks']} networks, {f['poisoned']} of them with a backdoor that works (on at least 80 % of triggered "
        f"test inputs); {failed} whose attack failed were left out"
        + (f", {len(left)} could not be read." if left else "."),
        "",
        _table(("attack", "networks"), attacks),
        "",
        _table(("networks", "number"), [(k, str(v)) for k, v in sorted(f["families"].items())]),
        "",
        f"{len(detector.heads.nets)} metanets that read the weights ({_size(detector.heads.nets):,} parameters each), "
        f"{len(detector.heads.questions)} sets of learned questions ({_size(detector.heads.questions):,} parameters), "
        "each trained without one part of the networks, and forests on training-free evidence of all. Weights in the "
        "stack, and among classes:",
        "",
        _table(("head", "in the probability", "among classes"), [
            (name, f"{a:.2f}", f"{b:.2f}")
            for name, a, b in zip(HEADS, detector.stack.weight, detector.mixture, strict=True)
        ]),
        "",
        "## How good it is",
        "",
        "On networks held out with everything of their ancestry (models unseen, attacks and architectures seen). The",
        "tests and the sizes of the forests were chosen on this population by other splits of it, so these figures are",
        "somewhat optimistic; `python tests/benchmarks/backdoor_detection.py FOLDER --shipped` asks it about others:",
        "",
        _table(("figure", "value"), [
            ("AUROC", f"{f['auroc']:.3f}"), *((f"AUROC, {n} alone", f"{f[f'auroc_{n}']:.3f}") for n in HEADS),
            ("true positives at 5 % false", f"{f['tpr_at_5']:.3f}"),
            ("cross-entropy", f"{f['cross_entropy']:.3f}"), ("Brier score", f"{f['brier']:.3f}"),
            ("expected calibration error", f"{f['ece']:.3f}"),
        ]),
        "",
        *_parts(detector),
        "The benchmark `tests/benchmarks/backdoor_detection.py` prints the same per attack, and for unseen attacks, "
        "data and architectures, with intervals and baselines.",
        "",
        "## Where it applies",
        "",
        f"{limits.parameters[0]:,} to {limits.parameters[1]:,} parameters, roles {', '.join(sorted(limits.roles))}, "
        f"activations {', '.join(sorted(limits.activations))}; a proved wiring; weights whose descriptor lies no "
        "farther from those of the training networks than those of held-out ones do (2 % of which are called outside).",
        "",
        "## What it cannot see",
        "",
        LIMITS,
    ]  # fmt: skip
    return "\n".join(lines)


def _parts(detector: Detector) -> list[str]:
    """Per attack and per family, of the same held-out networks."""
    def shown(x: float) -> str:
        return "" if x < 0 else f"{x:.3f}"

    f = detector.figures
    attacks = [(k, f"{v[0]:.0f}", *map(shown, v[1:])) for k, v in f.get("by_attack", {}).items()]
    families = [(k, f"{v[0]:.0f}", f"{v[1]:.0f}", shown(v[2])) for k, v in f.get("by_family", {}).items()]
    return [
        _table(("attack", "networks", "AUROC against all clean ones", "target first", "target in three"), attacks), "",
        _table(("networks", "number", "poisoned", "AUROC within"), families), "",
    ]  # fmt: skip


def _size(nets: Sequence[nn.Module]) -> int:
    return sum(p.numel() for p in nets[0].parameters()) if nets else 0


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


__all__ = ["LIMITS", "model_card"]
