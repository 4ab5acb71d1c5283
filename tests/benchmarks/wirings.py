"""The wiring table: every architecture of tests/architectures, traced, proved and compared with theory.

    python tests/benchmarks/wirings.py            # all
    python tests/benchmarks/wirings.py resnet bert
    python tests/benchmarks/wirings.py --markdown

Columns: is the wiring proved; relative change of the output under a random group element in float32 and in
float64; the least change when one tensor of a factor is permuted alone (the control: it must not be
nothing); movable factors found and known from theory; share of parameters on a movable axis; seconds for
tracing and proof.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.filterwarnings("ignore")

import torch  # noqa: E402

import weightspace as ws  # noqa: E402
from tests.architectures import CASES, Case  # noqa: E402


def row(case: Case) -> dict[str, object]:
    module, args, kwargs = case.build()
    start = time.perf_counter()
    wiring = ws.wiring(module, *args, **kwargs)
    seconds = time.perf_counter() - start
    found = Counter((f.size, tuple(wiring.factors[o].size for o in f.over)) for f in wiring.free.values())
    known = None if case.theory.free is None else Counter(dict(case.theory.free))
    proof = wiring.proof
    assert proof is not None
    return {
        "architecture": case.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "proved": "yes" if wiring.proved and not proof.demoted else "no",
        "float32": f"{proof.error32:.0e}",
        "float64": "" if proof.error64 is None else f"{proof.error64:.0e}",
        "control": "" if proof.control is None else f"{proof.control:.0e}",
        "found": found.total(),
        "theory": "debatable" if known is None else known.total(),
        "agrees": "" if known is None else ("yes" if found == known else "no"),
        "movable": f"{wiring.movable_share:.1%}",
        "seconds": f"{seconds:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of architecture names")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small networks: threads cost more than they bring
    try:
        from transformers import logging

        logging.set_verbosity_error()
    except ImportError:
        pass
    rows = []
    separator = " | " if options.markdown else "  "
    widths = (24, 11, 6, 7, 7, 7, 5, 9, 6, 7, 7)
    for case in CASES.values():
        if options.names and not any(n in case.name for n in options.names):
            continue
        entry = row(case)
        if not rows:
            print(separator.join(str(k).ljust(w) for k, w in zip(entry, widths, strict=True)))
            if options.markdown:
                print(" | ".join("---" for _ in entry))
        rows.append(entry)
        print(
            separator.join(str(v).ljust(w) for v, w in zip(entry.values(), widths, strict=True)), flush=True
        )
    proved = sum(r["proved"] == "yes" for r in rows)
    judged = [r for r in rows if r["agrees"]]
    agree = sum(r["agrees"] == "yes" for r in judged)
    print(
        f"\n{proved} of {len(rows)} proved; {agree} of {len(judged)} with exactly the symmetries that theory knows"
    )


if __name__ == "__main__":
    main()
