"""Write the API reference from the docstrings: ``make docs``, or ``python docs/reference.py site`` with pdoc installed.

Every module that says what is public (``__all__``) gets a page. Names that a package imports only when they are asked
for are asked for first, so that they stand where users import them from.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import weightspace
from weightspace.errors import MissingExtraError


def public_modules() -> list[str]:
    """Names of the package's modules that say what is public, after asking for each such name once."""
    found = []
    modules = (m.name for m in pkgutil.walk_packages(weightspace.__path__, "weightspace."))
    for name in ["weightspace", *modules]:
        if name.rsplit(".", 1)[-1].startswith("_"):
            continue
        try:
            importlib.import_module(name)
            # A package that is also a verb is hidden by the verb of the same name.
            module = sys.modules[name]
            for public in getattr(module, "__all__", ()):
                vars(module).setdefault(public, getattr(module, public))
        except (ImportError, MissingExtraError) as problem:
            print(f"left out: {name}: {problem}", file=sys.stderr)
            continue
        if hasattr(module, "__all__"):
            found.append(name)
    return found


def main() -> None:
    """Write the reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    try:
        import pdoc
        import pdoc.render
    except ImportError:
        raise SystemExit("the reference is written by pdoc: pip install pdoc") from None
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text=f"weightspace {weightspace.__version__}")
    modules = public_modules()
    with warnings.catch_warnings():
        # A package brings its modules along, and types that are imported for the checker alone are not resolved.
        warnings.simplefilter("ignore", UserWarning)
        pdoc.pdoc(*modules, output_directory=out)
    print(f"{len(modules)} modules in {out / 'index.html'}")


if __name__ == "__main__":
    main()
