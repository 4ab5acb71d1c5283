"""Real checkpoints that nobody here trained: opened, recognised, wired and proved, folder by folder.

python tests/benchmarks/real_files.py                     # ../shared/checkpoints
python tests/benchmarks/real_files.py FOLDER --markdown
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

from joblib import Parallel, delayed  # noqa: E402

import weightspace as ws  # noqa: E402
from weightspace.checkpoint import list_models  # noqa: E402
from weightspace.errors import UnknownFormatError, WeightspaceError  # noqa: E402


def look(path: Path) -> list[dict[str, Any]]:
    """A row per model in a file; none for a file that is no checkpoint."""
    rows = []
    try:
        addresses = list_models(path)
    except UnknownFormatError:
        return []
    for address in addresses:
        start = time.perf_counter()
        row: dict[str, Any] = {"folder": path.parent.name, "model": address, "status": "refused", "reason": ""}
        try:
            checkpoint = ws.open(address)
            row["format"] = checkpoint.format
            wiring = ws.wiring(checkpoint)
            proof = wiring.proof
            row |= {
                "status": wiring.status,
                "origin": wiring.origin,
                "movable": wiring.movable_share,
                "free": len(wiring.free),
                "error": None if proof is None else proof.error32,
                "demoted": 0 if proof is None else len(proof.demoted),
            }
        except WeightspaceError as error:
            row["reason"] = str(error)
        rows.append({**row, "seconds": time.perf_counter() - start})
    return rows


def spread(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return format(low, form) if format(low, form) == format(high, form) else f"{low:{form}}–{high:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "checkpoints")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    files = sorted(p for p in options.folder.rglob("*") if p.is_file())
    found = Parallel(n_jobs=options.jobs)(delayed(look)(p) for p in files)
    rows = [row for group in found for row in group]
    separator = " | " if options.markdown else "  "
    widths = (20, 6, 6, 22, 30, 8, 10, 10, 8)
    head = ("folder", "models", "proved", "formats", "recognised by", "free", "movable", "error", "seconds")
    print(separator.join(h.ljust(w) for h, w in zip(head, widths, strict=True)))
    if options.markdown:
        print(" | ".join("---" for _ in head))
    for folder in sorted({r["folder"] for r in rows}):
        group = [r for r in rows if r["folder"] == folder]
        wired = [r for r in group if "free" in r]
        origins = Counter(r["origin"].removeprefix("catalogue:") for r in wired)
        cells = (
            folder,
            len(group),
            sum(r["status"] == "proved" and not r["demoted"] for r in group),
            ", ".join(dict.fromkeys(r["format"] for r in group if "format" in r)),
            ", ".join(origins),
            spread([r["free"] for r in wired], "d") if wired else "",
            spread([r["movable"] for r in wired], ".0%") if wired else "",
            f"{max(r['error'] or 0 for r in wired):.0e}" if wired else "",
            f"{sum(r['seconds'] for r in group) / len(group):.2f}",
        )
        print(separator.join(str(c).ljust(w) for c, w in zip(cells, widths, strict=True)))
    proved = [r for r in rows if r["status"] == "proved" and not r["demoted"]]
    folders = {r["folder"] for r in rows}
    whole = {f for f in folders if all(r in proved for r in rows if r["folder"] == f)}
    print(f"\n{len(proved)} of {len(rows)} models proved; every model proved in {len(whole)} of {len(folders)} folders")
    for row in rows:
        if row not in proved:
            print(f"  {row['model']}: {row['status']} {row['reason']}")


if __name__ == "__main__":
    main()
