"""Each method against a reference of a few lines, written from the paper's formula; and what all must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightspace as ws
from weightspace.errors import MergeError
from weightspace.merge.draws import TorchMasks, bernoulli, uniform
from weightspace.merge.method import Prepared
from weightspace.merge.methods import METHODS, method_class
from weightspace.merge.select import kth_largest

Tensors = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"fc.weight": (24, 36), "conv.weight": (8, 4, 3, 3), "fc.bias": (24,), "s": ()}


def models(count: int, seed: int = 0, spread: float = 0.1) -> tuple[Tensors, list[Tensors]]:
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return base, [
        {name: t + spread * torch.randn(t.shape, generator=g) for name, t in base.items()} for _ in range(count)
    ]


def trimmed(delta: Tensor, density: float) -> Tensor:
    kept = max(1, int(density * delta.numel()))
    return delta * (delta.abs() >= delta.abs().flatten().sort(descending=True).values[kept - 1])


def elected(deltas: Tensor, weights: Tensor) -> Tensor:
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    return (deltas * agrees).sum(0) / (weights * agrees).sum(0).where(agrees.any(0), torch.ones(()))


def linear(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    return (w * ms).sum(0) / w.sum()


def slerp(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    a, b = ms[0].flatten().double(), ms[1].flatten().double()
    t = 0.3
    angle = torch.acos((a @ b / a.norm() / b.norm()).clamp(-1, 1))
    if torch.sin(angle) < 1e-6:
        return (1 - t) * ms[0] + t * ms[1]
    out = torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b
    return out.reshape(base.shape)


def task_arithmetic(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    return base + 0.7 * (w * (ms - base)).sum(0)


def ties(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    return base + elected(w * torch.stack([trimmed(m - base, 0.3) for m in ms]), w)


def dare_mask(name: str, i: int, shape: torch.Size, p: float) -> Tensor:
    return bernoulli(p, 5, name, i, 0, shape.numel()).reshape(shape)


def dare(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    masks = torch.stack([dare_mask(name, i, base.shape, 0.4) for i in range(len(ms))])
    return base + 0.4 * (w * masks * (ms - base) / 0.4).sum(0)


def dare_ties(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    masks = torch.stack([dare_mask(name, i, base.shape, 0.4) for i in range(len(ms))])
    kept = masks * (ms - base)
    lost = torch.stack([k.abs().sum() for k in kept])
    scale = torch.stack([(m - base).abs().sum() for m in ms]) / lost.where(lost > 0, torch.ones(()))
    return base + elected(w * kept * scale.reshape(w.shape), w)


def breadcrumbs(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    out = []
    for m in ms:
        delta = (m - base).flatten()
        n, top, kept = delta.numel(), int(0.05 * delta.numel()), int(0.4 * delta.numel())
        order = delta.abs().argsort(descending=True)
        mask = torch.zeros(n)
        mask[order[min(top, n - kept) : min(top, n - kept) + kept]] = 1
        out.append((delta * mask).reshape(base.shape))
    return base + 0.3 * (w * torch.stack(out)).sum(0)


def della(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    out = []
    for i, m in enumerate(ms):
        rows = (m - base).reshape(1, -1) if base.dim() < 2 else m - base
        ranks = rows.abs().argsort(-1).argsort(-1).float()
        last = rows.shape[-1] - 1
        chance = 0.5 - 0.2 + 2 * 0.2 * (ranks / last if last else torch.tensor(0.5))
        kept = uniform(5, name, i, 0, rows.numel()).reshape(rows.shape) < chance
        out.append((rows * kept / chance).reshape(base.shape))
    return base + elected(w * torch.stack(out), w)


def model_stock(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    d = (ms - base).reshape(len(ms), -1).double()
    n = len(ms)
    cosines = [torch.cosine_similarity(d[i], d[j], 0) for i in range(n) for j in range(i + 1, n)]
    cosine = sum(cosines) / len(cosines)
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * ms.mean(0) + (1 - t) * base


def pcb(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    tau = (ms - base).reshape(len(ms), -1)
    n, d = tau.shape
    ordered = tau.abs().sort(1).values
    low, high = ordered[:, int(d * 1e-4)], ordered[:, max(0, int(d * (1 - 1e-4) - 1))]
    size = tau.abs().clamp(low[:, None], high[:, None])
    span = size.amax(1, keepdim=True) - size.amin(1, keepdim=True)
    unit = (size - size.amin(1, keepdim=True)) / span.where(span > 0, torch.ones(()))
    beta = torch.exp(n * unit**2) * torch.tanh(tau * tau.sum(0))
    least = beta.sort(1).values[:, min(d - 1, int(d * (1 - 0.2)))][:, None]
    most = beta.amax(1, keepdim=True)
    share = (beta.clamp(min=least) - least) / (most - least).where(most > least, torch.ones(()))
    merged = (w.reshape(-1, 1) * tau.sign() * size * share).sum(0) / share.sum(0).clamp(min=1e-12)
    return base + merged.reshape(base.shape)


def tall_masks(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    multi = (w * (ms - base)).sum(0)
    mask = (base - ms[1]).abs() > 0.5 * (base + multi - ms[1]).abs()
    return base + mask * multi


def consensus(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    multi = (w * (ms - base)).sum(0)
    masks = (base - ms).abs() > 0.5 * (base + multi - ms).abs()
    return base + 0.3 * (masks.sum(0) >= 2) * multi


def matrix(t: Tensor) -> bool:
    return t.dim() >= 2


def tsv_m(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    tau = (w * (ms - base)).double()
    if not matrix(base):
        return base + tau.mean(0)
    flat = tau.flatten(2)
    kept = min(flat.shape[1:]) // len(ms)
    parts = [(u[:, :kept], s[:kept], v[:kept]) for u, s, v in (torch.linalg.svd(t) for t in flat)]
    us, ss, vs = zip(*parts, strict=True)
    u, s, v = torch.cat(us, 1), torch.cat(ss), torch.cat(vs, 0)
    # (U Uᵀ)^(-1/2) U, the polar factor, another way than in the package.
    polar = [x @ torch.linalg.inv(sqrt(x.T @ x)) for x in (u, v.T)]
    return base + (polar[0] @ torch.diag(s) @ polar[1].T).reshape(base.shape)


def sqrt(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def iso_c(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    total = (w * (ms - base)).sum(0).double()
    if not matrix(base):
        return base + total / len(ms)
    u, s, v = torch.linalg.svd(total.flatten(1), full_matrices=False)
    return base + (s.mean() * u @ v).reshape(base.shape)


def iso_cts(base: Tensor, ms: Tensor, w: Tensor, name: str) -> Tensor:
    tau = (w * (ms - base)).double()
    if not matrix(base):
        return base + tau.mean(0)
    flat = tau.flatten(2)
    rank, n = min(flat.shape[1:]), len(ms)
    each = round((rank - int(rank * 0.8)) / n)
    u, s, v = torch.linalg.svd(flat.sum(0), full_matrices=False)
    k = rank - each * n
    us, ss, vs = [u[:, :k]], [s[:k]], [v[:k]]
    for t in flat:
        a, b, c = torch.linalg.svd(t - us[0] @ us[0].T @ t, full_matrices=False)
        us, ss, vs = [*us, a[:, :each]], [*ss, b[:each]], [*vs, c[:each]]
    left, values, right = torch.cat(us, 1), torch.cat(ss), torch.cat(vs, 0)
    polar = [x @ torch.linalg.inv(sqrt(x.T @ x)) for x in (left, right.T)]
    return base + (values.mean() * polar[0] @ polar[1].T).reshape(base.shape)


Reference = Callable[[Tensor, Tensor, Tensor, str], Tensor]
CASES: list[tuple[str, dict[str, Any], Reference, Sequence[float]]] = [
    ("linear", {}, linear, (1.0, 2.0, 0.5)),
    ("slerp", {"t": 0.3}, slerp, (1.0, 1.0)),
    ("task-arithmetic", {"scale": 0.7}, task_arithmetic, (1.0, -0.5, 2.0)),
    ("ties", {"density": 0.3}, ties, (1.0, 1.0, 1.0)),
    ("ties", {"density": 0.3}, ties, (1.0, 0.3, 2.0)),
    ("dare", {"density": 0.4, "seed": 5}, dare, (1.0, 0.5, 1.0)),
    ("dare", {"density": 0.4, "seed": 5, "electing": True, "normalize": True, "rescale": "norm", "scale": 1.0},
     dare_ties, (1.0, 0.5, 1.0)),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.05}, breadcrumbs, (1.0, 0.5, 1.0)),
    ("della", {"density": 0.5, "epsilon": 0.2, "seed": 5}, della, (1.0, 0.5, 1.0)),
    ("model-stock", {}, model_stock, (1.0, 1.0, 1.0)),
    ("pcb", {"density": 0.2}, pcb, (1.0, 1.0, 0.8)),
    ("tall-masks", {"task": 1, "strictness": 0.5}, tall_masks, (1.0, 0.5, 1.0)),
    ("consensus", {"strictness": 0.5}, consensus, (1.0, 0.5, 1.0)),
    ("tsv-m", {}, tsv_m, (1.0, 0.5, 1.0)),
    ("iso-c", {}, iso_c, (1.0, 0.5, 1.0)),
    ("iso-cts", {"common": 0.8}, iso_cts, (1.0, 0.5, 1.0)),
]  # fmt: skip
OWN = tuple(dict.fromkeys(case[0] for case in CASES))


@pytest.mark.parametrize(("name", "hyper", "reference", "weights"), CASES)
def test_the_formula_of_the_paper(name: str, hyper: dict[str, Any], reference: Reference, weights: list[float]) -> None:
    base, tuned = models(len(weights))
    got = ws.merge(tuned, name, base=base, weights=weights, **hyper).tensors
    assert got is not None
    for key, origin in base.items():
        stacked = torch.stack([m[key] for m in tuned])
        shares = torch.tensor(weights).reshape(-1, *([1] * origin.dim()))
        expected = reference(origin, stacked, shares, key)
        torch.testing.assert_close(got[key].double(), expected.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["ties", "pcb", "slerp", "model-stock", "dare"])
def test_over_the_whole_model(name: str) -> None:
    """With scope='model' a model is one long vector."""
    case = next(c for c in CASES if c[0] == name)
    hyper = {**case[1], "scope": "model"} | ({"rescale": "inverse"} if name == "dare" else {})
    base, tuned = models(len(case[3]))
    got = ws.merge(tuned, name, base=base, weights=case[3], **hyper).tensors
    assert got is not None
    one = [torch.cat([t.flatten() for t in m.values()]) for m in (base, *tuned)]
    if name == "dare":
        expected = torch.cat([
            case[2](base[k], torch.stack([m[k] for m in tuned]),
                    torch.tensor(case[3]).reshape(-1, *([1] * base[k].dim())), k).flatten() for k in base
        ])  # fmt: skip
    else:
        expected = case[2](one[0], torch.stack(one[1:]), torch.tensor(case[3]).reshape(-1, 1), "")
    torch.testing.assert_close(torch.cat([t.flatten() for t in got.values()]).double(), expected.double(), rtol=1e-4,
                               atol=2e-5)  # fmt: skip


def own(name: str) -> int:
    return method_class(name).count[1] or 3


@pytest.mark.parametrize("name", OWN)
def test_copies_of_the_base_give_the_base(name: str) -> None:
    base, _ = models(0)
    got = ws.merge([base] * own(name), name, base=base).tensors
    assert got is not None
    for key in base:
        torch.testing.assert_close(got[key], base[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "slerp", "model-stock", "ties"])
def test_copies_of_one_model_give_that_model(name: str) -> None:
    base, tuned = models(1)
    hyper = {"density": 1.0} if name == "ties" else {}
    got = ws.merge(tuned * own(name), name, base=base, **hyper).tensors
    assert got is not None
    for key in base:
        torch.testing.assert_close(got[key], tuned[0][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("slerp", "dare", "della", "tall-masks", "iso-cts")])
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 1000))
def test_the_order_of_models_does_not_matter(name: str, order: list[int], seed: int) -> None:
    base, tuned = models(3, seed)
    weights = [1.0, 0.5, 2.0]
    one = ws.merge(tuned, name, base=base, weights=weights).tensors
    two = ws.merge([tuned[i] for i in order], name, base=base, weights=[weights[i] for i in order]).tensors
    assert one is not None
    assert two is not None
    for key in base:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3), factor=st.floats(-2, 2), seed=st.integers(0, 1000))
def test_task_arithmetic_is_linear_in_its_weights(weights: list[float], factor: float, seed: int) -> None:
    base, tuned = models(3, seed)
    one = ws.merge(tuned, "task-arithmetic", base=base, weights=weights, scale=1.0).tensors
    two = ws.merge(tuned, "task-arithmetic", base=base, weights=[factor * w for w in weights], scale=1.0).tensors
    assert one is not None
    assert two is not None
    for key in base:
        torch.testing.assert_close((two[key] - base[key]), factor * (one[key] - base[key]), rtol=1e-3, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_ties_follows_a_permutation_of_neurons(seed: int) -> None:
    """Permuting rows of all models alike permutes the result: no element is told apart by its place."""
    base, tuned = models(3, seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    move = lambda m: {"fc.weight": m["fc.weight"][order].round(decimals=1)}  # noqa: E731 rounding makes equal magnitudes
    keep = lambda m: {"fc.weight": m["fc.weight"].round(decimals=1)}  # noqa: E731
    one = ws.merge([keep(m) for m in tuned], "ties", base=keep(base)).tensors
    two = ws.merge([move(m) for m in tuned], "ties", base=move(base)).tensors
    assert one is not None
    assert two is not None
    assert torch.equal(one["fc.weight"][order], two["fc.weight"])


def test_ties_can_keep_exactly_the_share() -> None:
    """``equal="sorted"``: as many as the share says, of equal ones those that argsort puts first."""
    base = {"w": torch.zeros(400, 10)}
    g = torch.Generator().manual_seed(0)
    model = {"w": torch.randint(-3, 4, (400, 10), generator=g).float()}
    every = ws.merge([model], "ties", base=base, density=0.3).open()["w"]
    exact = ws.merge([model], "ties", base=base, density=0.3, equal="sorted").open()["w"]
    assert int((every != 0).sum()) > 1200 == int((exact != 0).sum())
    kept = model["w"].abs().flatten().argsort(descending=True)[:1200]
    assert torch.equal(exact.flatten()[kept], model["w"].flatten()[kept])
    with pytest.raises(MergeError, match="within a tensor"):
        ws.merge([model], "ties", base=base, equal="sorted", scope="model")


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 100, width=32) | st.integers(0, 3).map(float), min_size=1, max_size=300),
    k=st.integers(1, 300), pieces=st.integers(1, 7),
)  # fmt: skip
def test_the_threshold_is_that_of_sorting(values: list[float], k: int, pieces: int) -> None:
    t = torch.tensor(values, dtype=torch.float32)
    k = min(k, len(values))
    got = kth_largest(lambda: iter(t.chunk(pieces)), len(t), k)
    assert got == float(t.sort(descending=True).values[k - 1])


@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "two scales", "misled", "mostly zero"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_of_many_numbers(monkeypatch: pytest.MonkeyPatch, kind: str, share: float) -> None:
    """Through the sample's bracket, also where the sample tells lies or ties fill the bracket."""
    monkeypatch.setattr("weightspace.merge.select._HOLD", 1 << 12)
    monkeypatch.setattr("weightspace.merge.select._SMALL", 1 << 10)
    g = torch.Generator().manual_seed(0)
    t = torch.randn(40_000, generator=g).abs()
    if kind == "few values":
        t = t.round()
    elif kind == "one value":
        t = torch.full_like(t, 0.5)
    elif kind == "two scales":
        t[:50] *= 1e6
    elif kind == "mostly zero":
        t = t * (torch.rand(t.shape, generator=g) < 0.05)
    k = min(max(1, int(share * len(t))), len(t))
    sample = (lambda: torch.full((100,), 7.5)) if kind == "misled" else lambda: t[::40].clone()
    assert kth_largest(lambda: iter(t.split(3000)), len(t), k, sample) == float(t.sort(descending=True).values[k - 1])


def test_masks_depend_on_seed_name_and_model_alone() -> None:
    whole = bernoulli(0.3, 1, "a", 0, 0, 200_000)
    parts = torch.cat([bernoulli(0.3, 1, "a", 0, s, min(s + 77_777, 200_000)) for s in range(0, 200_000, 77_777)])
    assert torch.equal(whole, parts)
    assert abs(float(whole.float().mean()) - 0.3) < 0.005
    for other in (bernoulli(0.3, 2, "a", 0, 0, 200_000), bernoulli(0.3, 1, "b", 0, 0, 200_000),
                  bernoulli(0.3, 1, "a", 1, 0, 200_000)):  # fmt: skip
        assert abs(float((whole & other).float().mean()) - 0.09) < 0.005
    numbers = uniform(0, "a", 0, 0, 200_000)
    assert 0 <= float(numbers.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers.max()) < 1


def test_mergekits_masks_are_those_of_one_seeded_generator() -> None:
    """What mergekit does: torch is seeded once, then one bernoulli call per task vector, by name and model."""
    base, tuned = models(2)
    torch.manual_seed(11)
    expected = {}
    for key in sorted(base):
        total = torch.zeros(SHAPES[key])
        for m in tuned:
            delta = m[key] - base[key]
            kept = delta * torch.bernoulli(torch.full_like(delta, 0.5))
            total += kept * (delta.abs().sum() / kept.abs().sum() if kept.abs().sum() > 1e-7 else 1.0)
        expected[key] = base[key] + total
    got = ws.merge(tuned, "dare", base=base, density=0.5, scale=1.0, rescale="norm", masks=TorchMasks(11)).tensors
    assert got is not None
    for key in base:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-6)


def test_every_method_says_what_it_is() -> None:
    for name in METHODS:
        cls = method_class(name)
        assert cls.name == name
        assert cls.paper.split("(")[-1][:4].isdigit()
        assert cls.__doc__
        cls().check(cls.count[0])
        if not issubclass(cls, Prepared):
            other = Path(__file__).with_name("test_methods_data.py").read_text()
            assert name in OWN or f'"{name}"' in other, f"{name} is compared to no reference"


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("ties", {"density": (0.1, 0.2)}, "2 numbers for 3 models"),
        ("ties", {"scope": "layer"}, "'tensor' or 'model'"),
        ("ties", {"top": 3}, "no hyper-parameter 'top'; it has scope"),
        ("tis", {}, "did you mean ties"),
        ("dare", {"density": 0.0}, "0 < density"),
        ("dare", {"rescale": "l2"}, "'inverse', 'norm' or 'none'"),
        ("della", {"density": 0.1, "epsilon": 0.2}, "density ± epsilon"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "more than all"),
        ("tall-masks", {"task": 3}, "from 0 to 2"),
        ("consensus", {"least": 4}, "0 to 3 tasks"),
        ("slerp", {}, "merges 2 models, 3 were given"),
    ],
)
def test_mistakes_are_named(name: str, hyper: dict[str, Any], said: str) -> None:
    base, tuned = models(3)
    with pytest.raises(MergeError, match=said.replace("(", r"\(")):
        ws.merge(tuned, name, base=base, **hyper)
