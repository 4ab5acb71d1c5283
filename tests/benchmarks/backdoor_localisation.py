"""Where a backdoor sits, against truth: ``python tests/benchmarks/backdoor_localisation.py grafts|poisoned``.

``grafts``: networks with a subnet in them whose elements are known. The two published one-channel subnets (SRA, Qi et
al. 2022) are put into clean CIFAR ResNets (as many of their blocks as the network has) and into a VGG-16 of an eighth
of the width that is trained here a little (``--vgg``); others come from populations (``--zoo``, of
``weightspace zoo build backdoors``). Every network is judged at a position drawn at random and once more after a random
element of its symmetry group. Average precision over all elements (neurons, channels, heads, streams) of all axes, and
intersection over union of the first k, k the true number. ``--noise``: the same where noise of so many deviations of
each tensor lies on all weights, so that the cut is not clean.

``poisoned``: networks that learned a backdoor from poisoned data. The truth is trigger-activated change with the real
trigger (Zheng et al. 2022), per axis: average precision for the tenth of the elements that change most, and Spearman's
correlation, means over the axes; chance is what a random ranking gets. MNIST networks of the recipe ``backdoors`` were
used to choose how triggers are looked for; USPS, CIFAR-10, sentences and ``backdoors_fresh.toml`` were not.

Intervals are 95 % by bootstrap over networks. Rows go to ``--results`` as they come, and a second run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F

import weightspace as ws
from weightspace.backdoor.defences import anp_scores, clp_scores
from weightspace.backdoor.localise import locate, response
from weightspace.backdoor.subnets import separation
from weightspace.wiring.places import places
from weightspace.wiring.wiring import Permutation, Wiring
from weightspace.zoo.data import Data, DataSpec, load_data
from weightspace.zoo.description import module_of
from weightspace.zoo.files import read_record
from weightspace.zoo.grafting import cuts_of
from weightspace.zoo.poisoning import parts, relabelled, stamp
from weightspace.zoo.recipe import load as load_recipe

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "checkpoints"
Scores = Mapping[str, Tensor]
Row = dict[str, Any]

CLEAN = 100
"""Clean inputs that methods get which need some."""
TRUTH = 200
"""Inputs on which the change by the real trigger is measured."""
ANP_STEPS = 100
"""A quarter of the usual ones, for want of time."""
LARGEST_ANP = 100_000
"""Entries of networks on which ANP is run: it takes minutes for larger ones."""
WIDTHS = (8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64)
"""Channels of the VGG-16 that is trained here, an eighth of the usual ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["grafts", "poisoned", "apart"])
    parser.add_argument("--zoo", type=Path, nargs="*", default=[], help="folders of populations")
    parser.add_argument("--limit", type=int, default=0, help="networks of each population, 0 for all")
    parser.add_argument("--only", nargs="*", default=[], help="populations, all without")
    parser.add_argument("--draws", type=int, default=5, help="positions of each published subnet")
    parser.add_argument("--noise", type=float, nargs="*", default=[], help="deviations of noise on all weights")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--vgg", type=Path, help="where the trained VGG is kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if given.results and given.results.is_file():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = {(r["part"], r["network"], r["noise"]) for r in rows}
    for noise in [0.0, *given.noise] if given.part == "grafts" else [0.0]:
        jobs = {"grafts": graft_jobs, "poisoned": poisoned_jobs, "apart": apart_jobs}[given.part](given)
        for name, work in jobs:
            if (given.part, name, noise) in done:
                continue
            began = time.perf_counter()
            for row in work(noise):
                rows.append({"part": given.part, "network": name, "noise": noise, **row})
                if given.results:
                    with given.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
            print(f"{name} {noise} {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    rows = [r for r in rows if r["part"] == given.part]
    if given.json:
        print(json.dumps(rows))
    else:
        {"grafts": graft_table, "poisoned": poisoned_table, "apart": apart_table}[given.part](rows)


Work = Callable[[float], Iterator[Row]]

# ------------------------------------------------------------------------------------ grafts


def graft_jobs(given: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    """Networks with a subnet in them, by name."""
    for file in sorted((SHARED / "resnet-cifar").glob("*.th")):
        depth = file.stem.split("resnet")[1].split("-")[0]
        for seed in range(given.draws):
            yield f"SRA ResNet-{depth} {seed}", lambda noise, f=file, s=seed: _published(
                f, "narrow_resnet", s, noise, "SRA subnet in ResNet-" + f.stem.split("resnet")[1].split("-")[0]
            )
    if given.vgg is not None:
        for seed in range(given.draws):
            yield f"SRA VGG-16 {seed}", lambda noise, s=seed: _published(
                _vgg(given.vgg), "narrow_vgg", s, noise, "SRA subnet in VGG-16 (an eighth as wide)"
            )
    for path, record in _networks(given, "*-grafted-*"):
        if record.get("attack_worked"):
            yield path.name, lambda noise, p=path, r=record: _planted(p, r, noise)


def _published(file: Path, narrow: str, seed: int, noise: float, group: str) -> Iterator[Row]:
    """A published subnet in a clean network, each of its channels at a random position of its axis."""
    tensors = dict(ws.open(file).items())
    wiring = ws.wiring(file)
    (source,) = (SHARED / "backdoor-sra").glob(f"*{narrow}.ckpt")
    subnet = ws.open(source)
    generator = torch.Generator().manual_seed(seed)
    elements: dict[str, Tensor] = {}
    for name, factor in wiring.free.items():
        # The subnet's channels: what its weight for this axis has; the channels that a stage adds it leaves alone.
        wide = subnet[f"{name}.weight"].shape[0] if f"{name}.weight" in subnet else 0
        elements[name] = torch.randperm(factor.size, generator=generator)[:wide].sort().values
    target = int(torch.randint(10, (1,), generator=generator))
    for name, cut in cuts_of(wiring, elements).items():
        tensor = tensors[name].clone()
        tensor[cut.cut] = 0
        if name in subnet and tensor.is_floating_point():
            tensor[cut.inner] = subnet[name].to(tensor.dtype).reshape(-1)
        elif wiring.roles.get(name) == "weight":
            # The last layer: the subnet raises one class.
            tensor[cut.inner] = 0
            row = torch.zeros_like(cut.inner)
            row[target] = True
            tensor[cut.inner & row] = 1.0
        tensors[name] = tensor
    yield from _judged(wiring, tensors, elements, None, group, seed, noise)


def _planted(path: Path, record: Mapping[str, Any], noise: float) -> Iterator[Row]:
    elements = {n: torch.tensor(i) for n, i in record["poison"]["elements"].items()}
    group = f"{record['network']['kind']}, {record['data']}, trained here"
    yield from _judged(_wired(record), dict(ws.open(path).items()), elements, _data(record), group, 0, noise)


def _judged(
    wiring: Wiring, tensors: Mapping[str, Tensor], elements: Mapping[str, Tensor], data: Data | None, group: str,
    seed: int, noise: float,
) -> Iterator[Row]:  # fmt: skip
    if noise:
        generator = torch.Generator().manual_seed(seed + 17)
        tensors = {
            n: t + noise * t.std() * torch.randn(t.shape, generator=generator)
            if wiring.roles.get(n) == "weight" else t for n, t in tensors.items()
        }  # fmt: skip
    plain = [n for n, f in wiring.free.items() if not f.over]
    for moved in (False, True):
        permutation = wiring.random(seed + 1000) if moved else Permutation({}, wiring.factors)
        now = wiring.apply(permutation, tensors)
        truth = {}
        for name in plain:
            mark = torch.zeros(wiring.factors[name].size)
            mark[elements[name]] = 1
            truth[name] = mark[permutation._of(name)]
        own = separation(wiring, now)
        found: dict[str, Scores] = {"ours": own.scores}
        if not moved and not noise:
            found["CLP"] = clp_scores(wiring, now)
            if data is not None and sum(t.numel() for t in now.values()) < LARGEST_ANP:
                x, y = data.test_x[:CLEAN], data.test_y[:CLEAN]
                found["ANP"] = anp_scores(wiring, now, x, y, steps=ANP_STEPS)
            norms = _norms(wiring, now)
            found["weight norm"] = norms
            found["weight norm, least"] = {n: -v for n, v in norms.items()}
            generator = torch.Generator().manual_seed(seed)
            found["random"] = {n: torch.rand(v.shape, generator=generator) for n, v in truth.items()}
        for method, scores in found.items():
            ap, iou = _whole(truth, scores)
            yield {"group": group, "method": method, "moved": moved, "AP": ap, "IoU": iou, "seen": float(own.apart)}


def _whole(truth: Scores, scores: Scores) -> tuple[float, float]:
    """Over the elements of all axes: average precision, and intersection over union of as many as there are.

    An axis that a method says nothing of has its lowest score. Ties count as in a random order of them.
    """
    low = min(float(s.min()) for s in scores.values())
    y = torch.cat([t.flatten() for t in truth.values()]).numpy()
    each = [scores[n] if n in scores else torch.full(t.shape, low) for n, t in truth.items()]
    s = torch.cat([x.flatten() for x in each]).double().numpy()
    order = np.lexsort((np.random.default_rng(0).random(len(s)), -s))
    k = int(y.sum())
    hit = y[order[:k]].sum()
    return float(average_precision_score(y, s)), float(hit / (2 * k - hit))


def _norms(wiring: Wiring, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Deviations of an element's weights' norm from the mean of its axis."""
    found = {}
    for name, spots in places(wiring).items():
        if wiring.factors[name].over:
            continue
        total = sum(
            p.view(tensors[p.tensor]).square().sum(-1) for p in spots if wiring.roles.get(p.tensor) == "weight"
        )
        assert isinstance(total, Tensor)
        norm = total.sqrt()
        found[name] = (norm - norm.mean()) / norm.std().clamp(min=1e-9)
    return found


def graft_table(rows: list[Row]) -> None:
    for noise in sorted({r["noise"] for r in rows}):
        here = [r for r in rows if r["noise"] == noise]
        print(f"\nNoise of {noise:g} deviations on all weights\n" if noise else "")
        print("| networks | n | ranking | average precision | IoU at the true size |\n|---|---|---|---|---|")
        for group in [*dict.fromkeys(r["group"] for r in here), "all"]:
            chosen = [r for r in here if group in ("all", r["group"])]
            for method, moved in dict.fromkeys((r["method"], r["moved"]) for r in chosen):
                own = [r for r in chosen if r["method"] == method and r["moved"] == moved]
                label = method + (", permuted" if moved else "")
                print(f"| {group} | {len(own)} | {label} | {_ci(own, 'AP')} | {_ci(own, 'IoU')} |")
            found = [r["seen"] for r in chosen if r["method"] == "ours"]
            print(f"| {group} | {len(found)} | taken for a subnet: {np.mean(found):.0%} | | |")


# ------------------------------------------------------------------------------------ clean networks: how far apart


def apart_jobs(given: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    """All networks of the populations: the conductance that decides whether there is a subnet."""
    for path, record in _networks(given, "*.safetensors"):
        yield path.name, lambda _, p=path, r=record: iter([{
            "group": f"{r['network']['kind']}, {r['data']}",
            "grafted": (r.get("poison") or {}).get("attack") == "graft",
            "conductance": separation(_wired(r), dict(ws.open(p).items())).conductance,
        }])  # fmt: skip


def apart_table(rows: list[Row]) -> None:
    print("| networks | grafted | n | conductance, least | median | most |\n|---|---|---|---|---|---|")
    for group, grafted in sorted({(r["group"], r["grafted"]) for r in rows}):
        own = [r["conductance"] for r in rows if (r["group"], r["grafted"]) == (group, grafted)]
        text = " | ".join(f"{v:.3f}" for v in (min(own), float(np.median(own)), max(own)))
        print(f"| {group} | {'yes' if grafted else 'no'} | {len(own)} | {text} |")


# ------------------------------------------------------------------------------------ poisoned data


def poisoned_jobs(given: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    for path, record in _networks(given, "*.safetensors"):
        poison = record.get("poison") or {}
        if poison and poison["attack"] != "graft" and record.get("attack_worked"):
            yield path.name, lambda _, p=path, r=record: _poisoned(p, r)


def _poisoned(path: Path, record: Mapping[str, Any]) -> Iterator[Row]:
    wiring, tensors, data, poison = _wired(record), dict(ws.open(path).items()), _data(record), record["poison"]
    before, after = _triggered(poison, data)
    truth = response(wiring, tensors, before, after)
    x, y = data.test_x[-CLEAN:], data.test_y[-CLEAN:]
    aimed = None if poison["attack"] == "all-to-all" else int(poison["target"])
    generator = torch.Generator().manual_seed(0)
    # The class of the verdict is what `verdict.subspace` takes; flattering on networks that the detector was made with.
    said = ws.scan(path).target
    blind, scanned = (locate(wiring, tensors, target=t) for t in (None, said))
    shown = locate(wiring, tensors, inputs=x)
    found: dict[str, Scores] = {
        "ours, no data": blind.elements, "ours, no data, class of the scan": scanned.elements,
        "ours, 100 inputs": shown.elements,
        "CLP": clp_scores(wiring, tensors), "ANP": anp_scores(wiring, tensors, x, y, steps=ANP_STEPS),
        "random": {n: torch.rand(t.shape, generator=generator) for n, t in truth.items()},
    }  # fmt: skip
    if aimed is not None:
        found["ours, no data, target known"] = locate(wiring, tensors, target=aimed).elements
        found["ours, 100 inputs, target known"] = locate(wiring, tensors, target=aimed, inputs=x).elements
    targets = set(poison.get("targets", ())) or {aimed}
    aims = dict(zip(tuple(found)[:3], (blind.target, said, shown.target), strict=True))
    for method, scores in found.items():
        ap, rho = _each(truth, scores)
        yield {
            "group": f"{record['network']['kind']}, {record['data']}", "attack": poison["attack"], "method": method,
            "AP": ap, "Spearman": rho, "hit": float(aims.get(method) in targets),
        }  # fmt: skip


def _triggered(poison: Mapping[str, Any], data: Data) -> tuple[Tensor, Tensor]:
    """Test inputs without and with the real trigger, for every trigger of the poison."""
    singles = parts(poison)
    before, after = [], []
    for single in singles:
        wanted = relabelled(single, data.test_y, data.classes)
        index = torch.nonzero(wanted != data.test_y).flatten()[: TRUTH // len(singles)]
        before.append(data.test_x[index])
        after.append(stamp(data.test_x[index], single))
    return torch.cat(before), torch.cat(after)


def _each(truth: Scores, scores: Scores) -> tuple[float, float]:
    """Means over axes of eight elements or more: average precision for the top tenth, Spearman's correlation."""
    aps, rhos = [], []
    for name, change in truth.items():
        if name not in scores or change.numel() < 8 or not float(change.max()) > 0:
            continue
        t, s = change.flatten().double().numpy(), scores[name].flatten().double().numpy()
        top = np.zeros(len(t))
        top[np.argsort(-t)[: max(1, round(0.1 * len(t)))]] = 1
        aps.append(average_precision_score(top, s))
        rho = spearmanr(t, s).statistic
        rhos.append(0.0 if np.isnan(rho) else float(rho))
    return float(np.mean(aps)), float(np.mean(rhos))


def poisoned_table(rows: list[Row]) -> None:
    mnist = [r for r in rows if r["group"].endswith("mnist")]
    others = [r for r in rows if not r["group"].endswith("mnist")]
    for title, here in (("MNIST", mnist), ("other data", others)):
        if not here:
            continue
        print(f"\n{title}\n\n| networks | n | ranking | average precision, top tenth | Spearman |")
        print("|---|---|---|---|---|")
        named = [("attack", a) for a in sorted({r["attack"] for r in here})]
        named += [("group", g) for g in sorted({r["group"] for r in here})]
        for key, value in [*named, ("", "all")]:
            mine = [r for r in here if not key or r[key] == value]
            for method in dict.fromkeys(r["method"] for r in mine):
                own = [r for r in mine if r["method"] == method]
                print(f"| {value} | {len(own)} | {method} | {_ci(own, 'AP')} | {_ci(own, 'Spearman')} |")
        for method in ("ours, no data", "ours, no data, class of the scan", "ours, 100 inputs"):
            own = [r for r in here if r["method"] == method and r["attack"] != "all-to-all"]
            print(f"\ntarget class found, {method}: {_ci(own, 'hit')} of {len(own)}")


# ------------------------------------------------------------------------------------ networks and data


def _networks(given: argparse.Namespace, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Networks of the populations, the first of each, the second of each and so on; of poisoned ones those that are."""
    found: list[tuple[int, str, Path, dict[str, Any]]] = []
    counts: dict[str, int] = {}
    for path in sorted(p for folder in given.zoo for p in folder.glob(pattern)):
        record = read_record(path)
        population = str(record.get("population"))
        if not record.get("attack_worked", bool(record)):
            continue
        if given.only and population not in given.only:
            continue
        counts[population] = counts.get(population, 0) + 1
        if not given.limit or counts[population] <= given.limit:
            found.append((counts[population], population, path, record))
    for *_, path, record in sorted(found, key=lambda row: row[:2]):
        yield path, record


_WIRINGS: dict[str, Wiring] = {}


def _wired(record: Mapping[str, Any]) -> Wiring:
    key = json.dumps(record["network"], sort_keys=True)
    if key not in _WIRINGS:
        module, inputs = module_of(record["network"])
        _WIRINGS[key] = ws.wiring(module.eval(), *inputs)
    return _WIRINGS[key]


def _data(record: Mapping[str, Any]) -> Data:
    return _load(str(record["recipe"]), str(record["population"]))


@cache
def _load(recipe: str, population: str) -> Data:
    own = ROOT / "zoo" / f"{recipe}.toml"
    # Populations for a benchmark alone have their recipe beside it.
    own = own if own.is_file() else ROOT / "tests" / "benchmarks" / f"{recipe.replace('-', '_')}.toml"
    (found,) = (p for p in load_recipe(own).sampled if p.name == population)
    return load_data(found.data)


@cache
def _cifar() -> Data:
    """As the published ResNets saw it: mean and deviation of ImageNet."""
    data = load_data(DataSpec("cifar10", train=IMAGES, test=1000))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return Data(*((x - mean) / deviation if x.dim() == 4 else x for x in (
        data.train_x, data.train_y, data.test_x, data.test_y
    )))  # fmt: skip


IMAGES = 4096
"""Images that the VGG-16 is trained on."""


class _VGG16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        incoming = 3
        for i, width in enumerate(WIDTHS):
            layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (1, 3, 6, 9, 12) else []
            incoming = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(incoming, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.features(x).flatten(1))
        return found


def _vgg(path: Path, epochs: int = 2) -> Path:
    """A clean narrow VGG-16 for CIFAR-10, trained a little if it is not there."""
    if path.is_file():
        return path
    torch.manual_seed(0)
    net, data = _VGG16(), _cifar()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    steps = epochs * (IMAGES // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(IMAGES)[: IMAGES // 128 * 128].view(-1, 128):
            loss = F.cross_entropy(net(data.train_x[index]), data.train_y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        right = float((net(data.test_x[:1000]).argmax(1) == data.test_y[:1000]).float().mean())
    print(f"VGG-16 of an eighth of the width: test accuracy {right:.3f}", file=sys.stderr)
    from safetensors.torch import save_file

    save_file(net.state_dict(), path)
    return path


def _ci(rows: list[Row], key: str) -> str:
    """Mean and 95 % interval by bootstrap over networks."""
    x = np.array([r[key] for r in rows], dtype=float)
    if not len(x):
        return "–"
    draws = np.random.default_rng(0).choice(x, (2000, len(x))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
