"""Coverage-guided fuzzing of the readers with atheris: ``python tests/fuzz/fuzz_readers.py [seconds]``.

Starts from a valid file of every format. An input that raises anything but a `WeightspaceError`, or takes
too long or too much memory, is written to ``tests/corpus``; fix the reader and keep the file, which
`tests/checkpoint/test_fuzz.py` opens from then on. HDF5 is parsed by its own C library, which coverage of
Python code does not see; ``test_fuzz.py`` damages it at random instead.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["weightspace.checkpoint", "zipfile"]):
    import weightspace.checkpoint

from tests.checkpoint import fixtures  # noqa: E402
from tests.checkpoint.mutate import survive  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def once(data: bytes) -> None:
    """Open one input."""
    path = FOLDER / "input"
    path.write_bytes(data)
    survive(path)


def main() -> None:
    """Write the seeds and run for the given number of seconds (60)."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for name in fixtures.available():
        path, _ = fixtures.write(name, seeds)
        path.rename(seeds / f"seed_{name}")
    limits = ["-timeout=5", "-rss_limit_mb=3000", "-max_len=12000", f"-max_total_time={seconds}"]
    findings = ROOT / "tests" / "corpus"
    findings.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={findings}/", str(seeds)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    assert weightspace.checkpoint.open
    main()
