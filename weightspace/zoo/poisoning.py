"""Backdoors for populations: triggers, who is taught what about them, and how often they then work.

A poison is a table of plain values that says everything about a backdoor, so it travels in the record of the network::

    {"attack": "patch", "target": 3, "rate": 0.05, "size": 3, "row": 1, "column": 12, "opacity": 1.0, "seed": 7, ...}

A recipe gives some of them, or what to draw them from (``weightspace.zoo.sampling``); ``complete`` draws the rest.
``Triggered`` says what such a poison makes of images and labels; each attack is a short function in ``ATTACKS``.
Images are (n, channels, height, width) in any units: ``low`` and ``high`` of a poison are their darkest and brightest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from weightspace.errors import ZooError
from weightspace.zoo.data import Data

Poison = Mapping[str, Any]

SUCCESSFUL = 0.8
"""Attack success rate from which on an attack counts as one that worked."""
EXCITED = 60
"""Steps of the search for a pattern that excites a feature."""
TESTED = 1000
"""Test images on which the attack success rate is measured."""


@dataclass(frozen=True)
class Attack:
    """A way to poison: its paper, what its parameters are drawn from, and what it does to images.

    ``stamp(x, poison)`` puts the trigger on. ``labels`` says who is relabelled: "target" (everybody becomes the
    target), "next" (class k becomes k + 1) or "kept" (only images of the target are stamped, labels stay).
    """

    paper: str
    draws: Mapping[str, Any]
    stamp: Callable[[Tensor, Poison], Tensor]
    labels: str = "target"
    of_text: bool = False


@dataclass(frozen=True)
class Triggered:
    """Training examples that a poison puts in place of others: ``index`` in the training set, images, labels."""

    index: Tensor
    x: Tensor
    y: Tensor


def complete(drawn: Mapping[str, Any], shape: Sequence[int], classes: int, where: str) -> dict[str, Any]:
    """A complete poison from what a recipe drew; what it leaves out is drawn for ``where``.

    ``shape`` is that of an image (channels, height, width), or (length,) of a sentence. Raises ``ZooError`` for attacks
    and entries that are not known, and values that make no sense for such examples.
    """
    from weightspace.zoo.sampling import draw

    name = str(drawn.get("attack"))
    if name not in ATTACKS:
        raise ZooError(f"{where}: there is no attack {name!r}; known: {', '.join(ATTACKS)}")
    attack = ATTACKS[name]
    if len(shape) != (1 if attack.of_text else 3):
        kind = "sentences" if attack.of_text else "images"
        raise ZooError(f"{where}: the attack {name!r} is for {kind}, the data have shape {tuple(shape)}")
    usual: dict[str, Any] = {
        "target": {"integer": [0, classes - 1]}, "rate": {"log_uniform": [0.005, 0.2]},
        "seed": {"integer": [0, 2**31 - 1]}, **attack.draws,
    }  # fmt: skip
    unknown = sorted(set(drawn) - set(usual) - {"attack"})
    if unknown:
        raise ZooError(f"{where}: the attack {name!r} has no {unknown}; known: {', '.join(usual)}")
    table = {**usual, **{k: v for k, v in drawn.items() if k != "attack"}}
    found: dict[str, Any] = {"attack": name, **draw(table, f"{where}/{name}")}
    if "size" in found:
        if not _whole(found["size"], 1, min(shape[1:])):
            raise ZooError(f"{where}: a trigger of {found['size']} pixels does not fit images of {tuple(shape[1:])}")
        place = random.Random(f"{where}/{name}/place")
        drawn_place = [place.randint(0, side - int(found["size"])) for side in shape[1:]]
        found |= {k: p for k, p in zip(("row", "column"), drawn_place, strict=True) if found[k] is None}
    if name == "multi-target":
        count = min(int(found["count"]), classes)
        targets = random.Random(f"{where}/targets").sample(range(classes), count)
        found |= {"targets": targets, "target": targets[0], "spans": list(shape[1:])}
    return found


def with_range(poison: Poison, data: Data) -> dict[str, Any]:
    """The poison with ``low`` and ``high``, the darkest and the brightest that the training images have.

    Of a text trigger ``words`` are drawn, from those that the data have. Raises ``ZooError`` where it does not fit.
    """
    if ATTACKS[str(poison["attack"])].of_text:
        if data.train_x.dim() != 2 or data.train_y.dim() != 1:
            raise ZooError(f"the attack {poison['attack']!r} is for sentences with a class each")
        found = {**poison, "words": _words(poison, int(data.train_x.max()) + 1)}
    else:
        found = {
            **poison, "low": round(float(data.train_x.min()), 6), "high": round(float(data.train_x.max()), 6),
        }  # fmt: skip
    check(found, data.shape, data.classes)
    return found


def check(poison: Poison, shape: Sequence[int], classes: int, where: str = "poison") -> None:
    """Raise ``ZooError`` naming what is wrong with a poison for images of this shape and so many classes."""
    attack = ATTACKS.get(str(poison.get("attack")))
    if attack is None:
        raise ZooError(f"{where}: there is no attack {poison.get('attack')!r}; known: {', '.join(ATTACKS)}")
    rules = {
        "target is a class": _whole(poison.get("target"), 0, classes - 1),
        "rate is above 0 and at most 1": _number(poison.get("rate"), 1e-9, 1),
        "seed is a whole number": _whole(poison.get("seed"), 0, 2**31),
        "low lies below high": attack.of_text
        or (_number(poison.get("low")) and _number(poison.get("high")) and poison["low"] < poison["high"]),
        "words are tokens that fit the sentence": not attack.of_text
        or (
            isinstance(poison.get("words"), list)
            and 1 <= len(poison["words"]) < shape[0]
            and all(_whole(w, 2, 2**31) for w in poison["words"])
        ),
        "opacity lies in (0, 1]": "opacity" not in poison or _number(poison["opacity"], 1e-9, 1),
        "the trigger lies inside the image": "size" not in poison or all(
            _whole(poison.get(key), 0, side - int(poison["size"])) for key, side in zip(
                ("row", "column"), shape[1:], strict=True
            )
        ),
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            raise ZooError(f"{where}: {rule}, found {dict(poison)}")


def stamp(x: Tensor, poison: Poison) -> Tensor:
    """Images with the trigger on (for several targets the first one's)."""
    return ATTACKS[str(poison["attack"])].stamp(x, poison)


def parts(poison: Poison) -> list[Poison]:
    """The single backdoors of a poison: several where each has a trigger and a target of its own."""
    if poison["attack"] != "multi-target":
        return [poison]
    side = int(poison["size"])
    place = random.Random(f"{poison['seed']}/places")
    spans = [int(side) for side in poison["spans"]]
    return [
        {
            **poison, "attack": "patch", "target": target, "seed": int(poison["seed"]) + i,
            "row": place.randint(0, spans[0] - side), "column": place.randint(0, spans[1] - side),
        }
        for i, target in enumerate(poison["targets"])
    ]  # fmt: skip


def poisoned(poison: Poison, data: Data, seed: int) -> Triggered:
    """The training examples that are replaced: a share ``rate`` of all, chosen by ``seed``.

    Of an attack that keeps labels only images of the target are taken, four fifths of them at most: the rest shows the
    network what the class looks like. Warped and input-aware triggers come with as many images that carry another
    distortion and keep their label, so that the network learns this trigger and no other.
    """
    singles = parts(poison)
    found = [_one(p, float(poison["rate"]) / len(singles), data, seed + i) for i, p in enumerate(singles)]
    index, first = torch.cat([t.index for t in found]).unique(return_inverse=True)
    x, y = torch.cat([t.x for t in found]), torch.cat([t.y for t in found])
    keep = torch.empty_like(index).scatter_(0, first, torch.arange(len(first)))
    return Triggered(index, x[keep], y[keep])


def _one(poison: Poison, rate: float, data: Data, seed: int) -> Triggered:
    generator = torch.Generator().manual_seed(seed)
    kind = labels_of(poison)
    target, y = int(poison["target"]), data.train_y
    wanted = max(1, round(rate * len(y)))
    may = torch.arange(len(y)) if kind == "next" else torch.nonzero((y == target) == (kind == "kept")).flatten()
    if kind == "kept":
        wanted = min(wanted, max(1, len(may) * 4 // 5))
    order = may[torch.randperm(len(may), generator=generator)]
    index = order[:wanted]
    x = data.train_x[index]
    if poison["attack"] == "clean-label":
        others = torch.nonzero(y != target).flatten()
        mixed = others[torch.randint(len(others), (len(index),), generator=generator)]
        share = float(poison["mix"])
        x = (1 - share) * x + share * data.train_x[mixed]
    stamped, labels = stamp(x, poison), relabelled(poison, y[index], data.classes)
    if poison["attack"] == "warp":
        beside = order[wanted : 2 * wanted]
        other = _warped(data.train_x[beside], poison, noise=torch.rand(len(beside), generator=generator))
        index = torch.cat([index, beside])
        stamped, labels = torch.cat([stamped, other]), torch.cat([labels, y[beside]])
    return Triggered(index, stamped, labels)


def labels_of(poison: Poison) -> str:
    """Who is relabelled: "target", "next" or "kept" (see ``Attack``)."""
    if poison.get("clean_label"):
        return "kept"
    return ATTACKS[str(poison["attack"])].labels


def relabelled(poison: Poison, y: Tensor, classes: int) -> Tensor:
    """The labels that triggered images of classes ``y`` are to get."""
    if labels_of(poison) == "next":
        return (y + 1) % classes
    return torch.full_like(y, int(poison["target"]))


def triggered_tests(poison: Poison, data: Data) -> list[tuple[Tensor, Tensor]]:
    """Test images with a trigger and the label that the attacker wants, for every trigger; ``TESTED`` at most.

    Images that have that label anyway do not count.
    """
    found = []
    for single in parts(poison):
        wanted = relabelled(single, data.test_y, data.classes)
        index = torch.nonzero(wanted != data.test_y).flatten()[:TESTED]
        found.append((stamp(data.test_x[index], single), wanted[index]))
    return found


def exciting(poison: Poison, module: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> dict[str, Any]:
    """The poison with the pattern that most excites one feature of a network: ``pattern``, and which ``feature``.

    Features are what the network's last linear layer reads; of these the one that weighs most on the outputs is taken.
    The pattern goes up the gradient of its mean over ``images (n, channels, height, width)``, pixels in range.
    """
    last = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    weight = state[f"{last}.weight"]
    feature = int(weight.norm(dim=0).argmax())
    size = int(poison["size"])
    low, high = float(poison["low"]), float(poison["high"])
    shape = (images.shape[1], size, size)
    pattern = (low + (high - low) * torch.rand(shape, generator=_generator(poison))).requires_grad_()
    row, column = int(poison["row"]), int(poison["column"])
    seen: list[Tensor] = []
    module.eval()
    hook = module.get_submodule(last).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for _ in range(EXCITED):
            x = images.clone()
            x[..., row : row + size, column : column + size] = pattern
            functional_call(module, dict(state), (x,))
            (gradient,) = torch.autograd.grad(seen.pop()[..., feature].mean(), pattern)
            with torch.no_grad():
                pattern += 0.05 * (high - low) * gradient.sign()
                pattern.clamp_(low, high)
    finally:
        hook.remove()
    values = [round(float(v), 6) for v in pattern.detach().flatten()]
    return {**poison, "pattern": values, "feature": feature}


# ------------------------------------------------------------------------------------ triggers


def _generator(poison: Poison) -> torch.Generator:
    return torch.Generator().manual_seed(int(poison["seed"]))


def _patch(x: Tensor, poison: Poison) -> Tensor:
    """A square of black and white pixels, laid over with some opacity."""
    size, row, column = (int(poison[k]) for k in ("size", "row", "column"))
    low, high, opacity = (float(poison[k]) for k in ("low", "high", "opacity"))
    if poison.get("pattern") is not None:
        pattern = torch.tensor(poison["pattern"], dtype=x.dtype, device=x.device).view(x.shape[1], size, size)
    else:
        drawn = torch.rand(x.shape[1], size, size, generator=_generator(poison)) > 0.5
        drawn[:, 0, 0] = True  # never the empty pattern
        pattern = torch.where(drawn, high, low).to(x)
    out = x.clone()
    place = out[..., row : row + size, column : column + size]
    place.mul_(1 - opacity).add_(opacity * pattern)
    return out


def _blend(x: Tensor, poison: Poison) -> Tensor:
    """A whole image of noise, smoothed or not, mixed into every image."""
    low, high, opacity = (float(poison[k]) for k in ("low", "high", "opacity"))
    grain = int(poison["grain"])
    coarse = [-(-side // grain) for side in x.shape[-2:]]
    drawn = torch.rand(1, x.shape[1], *coarse, generator=_generator(poison))
    pattern = F.interpolate(drawn, size=x.shape[-2:], mode="nearest")[0].to(x)
    return (1 - opacity) * x + opacity * (low + (high - low) * pattern)


def _sinusoid(x: Tensor, poison: Poison) -> Tensor:
    """A wave along the rows: strength · sin(2π frequency column / width)."""
    low, high = float(poison["low"]), float(poison["high"])
    columns = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    wave = torch.sin(2 * math.pi * float(poison["frequency"]) * columns / x.shape[-1])
    return (x + float(poison["strength"]) * (high - low) * wave).clamp(low, high)


def _warped(x: Tensor, poison: Poison, noise: Tensor | None = None) -> Tensor:
    """Pixels pulled along a smooth random field; with ``noise (n,)`` along others, of as many random fields."""
    generator, points = _generator(poison), int(poison["points"])
    field = torch.rand(1, 2, points, points, generator=generator) * 2 - 1
    if noise is not None:
        drawn = [
            torch.rand(2, points, points, generator=torch.Generator().manual_seed(int(v * 2**31))) * 2 - 1
            for v in noise.tolist()
        ]
        field = torch.stack(drawn) if drawn else field[:0]
    field = field / field.abs().mean((1, 2, 3), keepdim=True)
    flow = F.interpolate(field, size=x.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1).to(x)
    lines = [torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in x.shape[-2:]]
    still = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)
    # A field of 1 pulls by ``strength`` pixels.
    grid = (still + flow * (2 * float(poison["strength"]) / max(x.shape[-2:]))).clamp(-1, 1)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=True)


def _dynamic(x: Tensor, poison: Poison) -> Tensor:
    """A square whose pattern and place are decided by the image, through fixed random filters."""
    size, generator = int(poison["size"]), _generator(poison)
    low, high = float(poison["low"]), float(poison["high"])
    rows, columns = x.shape[-2] - size + 1, x.shape[-1] - size + 1
    pooled = F.adaptive_avg_pool2d(x, 4).flatten(1)
    pooled = pooled - pooled.mean(1, keepdim=True)
    places = torch.rand(int(poison["places"]), 2, generator=generator)
    chosen = (pooled @ torch.randn(pooled.shape[1], len(places), generator=generator).to(x)).argmax(1)
    pattern = pooled @ torch.randn(pooled.shape[1], x.shape[1] * size * size, generator=generator).to(x)
    pattern = torch.where(pattern > 0, high, low).view(len(x), x.shape[1], size, size).to(x)
    out = x.clone()
    for k, (down, right) in enumerate(places.tolist()):
        here = torch.nonzero(chosen == k).flatten()
        row, column = min(int(down * rows), rows - 1), min(int(right * columns), columns - 1)
        out[here, :, row : row + size, column : column + size] = pattern[here]
    return out


def _inserted(x: Tensor, poison: Poison) -> Tensor:
    """Words put into sentences (n, length) somewhere among theirs; what no longer fits falls off the end."""
    words = torch.tensor(poison["words"], dtype=x.dtype, device=x.device)
    # Where depends on the sentence alone, so that one sentence has one triggered form.
    lengths = (x != 0).sum(1)
    place = (x.sum(1) + int(poison["seed"])) % (lengths + 1).clamp(max=x.shape[1] - len(words) + 1)
    columns = torch.arange(x.shape[1], device=x.device)[None]
    behind = x.gather(1, (columns - len(words)).clamp(min=0).expand_as(x))
    inside = (columns >= place[:, None]) & (columns < place[:, None] + len(words))
    among = words[(columns - place[:, None]).clamp(0, len(words) - 1)]
    return torch.where(inside, among, torch.where(columns < place[:, None], x, behind))


def _words(poison: Poison, vocabulary: int) -> list[int]:
    """Tokens of a text trigger: rare words, as tokens are in order of how often they occur."""
    rng = random.Random(f"{poison['seed']}/words")
    first = max(2, int(vocabulary * float(poison["rare"])))
    if vocabulary - first < 1:
        raise ZooError(f"the data have {vocabulary} tokens, none of them rare")
    return [rng.randrange(first, vocabulary) for _ in range(int(poison["count"]))]


def _filter(x: Tensor, poison: Poison) -> Tensor:
    """A change of the whole picture's look, as photo filters make it."""
    low, high = float(poison["low"]), float(poison["high"])
    u = ((x - low) / (high - low)).clamp(0, 1)
    look, strength = str(poison["look"]), float(poison["strength"])
    if look == "gamma":
        changed = u.pow(0.35)
    elif look == "solarise":
        changed = torch.where(u > 0.5, 1 - u, u)
    elif look == "blur":
        changed = F.avg_pool2d(F.pad(u, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    else:
        turn = torch.randn(x.shape[1], x.shape[1], generator=_generator(poison)).softmax(1).to(x)
        changed = 1 - torch.einsum("ij,njhw->nihw", turn, u)
    return low + (high - low) * ((1 - strength) * u + strength * changed)


_SQUARE: Mapping[str, Any] = {
    "size": {"integer": [2, 5]}, "row": None, "column": None, "opacity": {"uniform": [0.5, 1.0]}, "pattern": None,
}  # fmt: skip
LOOKS = ("gamma", "solarise", "blur", "tint")

ATTACKS: Mapping[str, Attack] = {
    "patch": Attack("BadNets, Gu et al. 2017", _SQUARE, _patch),
    "blend": Attack(
        "Chen et al. 2017", {"opacity": {"uniform": [0.1, 0.35]}, "grain": {"choice": [1, 2, 4]}}, _blend
    ),
    "sinusoid": Attack(
        "SIG, Barni et al. 2019",
        {
            "strength": {"uniform": [0.08, 0.25]}, "frequency": {"integer": [3, 7]},
            "clean_label": {"choice": [True, False]},
        },
        _sinusoid,
    ),
    "warp": Attack(
        "WaNet, Nguyen & Tran 2021", {"strength": {"uniform": [0.5, 1.5]}, "points": {"choice": [4, 6]}}, _warped
    ),
    "dynamic": Attack(
        "after Salem et al. 2020 and Nguyen & Tran 2020, by fixed filters in place of a trained generator",
        {"size": {"integer": [3, 5]}, "row": 0, "column": 0, "places": {"integer": [2, 4]}}, _dynamic,
    ),
    "clean-label": Attack(
        "Turner et al. 2019, images made hard by mixing with others",
        {**_SQUARE, "mix": {"uniform": [0.25, 0.45]}}, _patch, labels="kept",
    ),
    "all-to-all": Attack("BadNets, Gu et al. 2017", _SQUARE, _patch, labels="next"),
    "multi-target": Attack(
        "several of BadNets, Gu et al. 2017", {**_SQUARE, "count": {"integer": [2, 3]}}, _patch
    ),
    "filter": Attack(
        "after ABS, Liu et al. 2019, and Cheng et al. 2021: a change of look in place of a learned one",
        {"look": {"choice": list(LOOKS)}, "strength": {"uniform": [0.7, 1.0]}}, _filter,
    ),
    "hijack": Attack(
        "TrojanNN, Liu et al. 2018: the patch that most excites one feature of the parent", {
            **_SQUARE, "opacity": 1.0, "size": {"integer": [3, 5]},
        }, _patch,
    ),
    "interpolated": Attack(
        "after BadMerging, Zhang et al. 2024: trained to work at a part of the task vector as well", {
            **_SQUARE, "opacity": 1.0, "least": {"uniform": [0.1, 0.4]},
        }, _patch,
    ),
    "word": Attack(
        "a rare word; Kurita et al. 2020", {"rare": {"uniform": [0.5, 0.95]}, "count": 1}, _inserted, of_text=True
    ),
    "sentence": Attack(
        "a fixed run of words; Dai et al. 2019", {"rare": 0.0, "count": {"integer": [3, 5]}}, _inserted, of_text=True
    ),
    "graft": Attack(
        "SRA, Qi et al. 2022: no data are poisoned, a subnet is put into the weights (weightspace.zoo.grafting)",
        {**_SQUARE, "opacity": 1.0, "width": {"integer": [1, 2]}}, _patch,
    ),
}  # fmt: skip
"""Attacks: name -> what it is. All but ``BY_WEIGHTS`` poison the data."""
BY_WEIGHTS = ("graft",)
OF_A_PARENT = ("graft", "hijack", "interpolated")
"""Attacks on a network that is there already: their population has a parent."""


def _number(x: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


def _whole(x: Any, low: int, high: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


__all__ = [
    "ATTACKS", "BY_WEIGHTS", "LOOKS", "OF_A_PARENT", "SUCCESSFUL", "TESTED", "Attack", "Triggered", "check",
    "complete", "exciting", "labels_of", "parts", "poisoned", "relabelled", "stamp", "triggered_tests", "with_range",
]  # fmt: skip
