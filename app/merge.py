"""Merge lab: will these models merge, how well by which method; make the merge, measure it, take it away."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from weightspace.errors import WeightspaceError
from weightspace.explorer import lab, ui, uploads
from weightspace.explorer.jobs import key_of
from weightspace.explorer.lab import Made
from weightspace.explorer.measuring import Measured, draw_curves
from weightspace.explorer.models import UPLOAD, Shelf

SCORE, MAKE = (f"weightspace.explorer.lab:{name}" for name in ("score", "make"))
MEASURE = "weightspace.explorer.measuring:measure"
ICONS = {"stop": ":red-badge[stop]", "warning": ":orange-badge[warning]", "note": ":blue-badge[note]"}


def report(shelf: Shelf, names: list[str], base: str | None) -> dict[str, Any] | None:
    """The merge-ability report, by a worker; measured merges of the zoo count."""
    zoo = None if shelf.zoo is None else str(shelf.zoo.folder)
    recorded = "" if shelf.zoo is None else _stamp(shelf.zoo.index / "merges.jsonl")
    models = {name: shelf.address(name) for name in names}
    of = [*((n, shelf.content(n)) for n in names), base and shelf.content(base), recorded]
    return ui.work("Scoring the merge", SCORE, models, base and shelf.address(base), zoo, recorded, of=of)


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def shown_report(found: Mapping[str, Any], names: list[str], measured: Mapping[str, float]) -> None:
    verdict = ui.plain(found["verdict"])
    verdict = verdict[:1].upper() + verdict[1:] + "."
    (st.success if found["ok"] and found["best"] else st.warning)(verdict, icon=":material/balance:")
    findings = found["preflight"].get("findings", [])
    if findings:
        with st.expander(f"{len(findings)} findings before the merge", icon=":material/fact_check:",
                         expanded=not found["ok"]):  # fmt: skip
            for one in findings:
                st.markdown(f"{ICONS.get(one['severity'], '')} **{one['check']}** · {ui.plain(_sentence(one))}")
    for note in [*found["notes"], *(f"{name}: {why}" for name, why in found["left"].items())]:
        st.caption(f":material/info: {ui.plain(note)}")
    if not found["merges"]:
        return
    first = found["merges"][0]
    label = " + ".join(first["models"])
    frame = lab.predictions(first, found["why"].get(label, {}))
    known = frame[frame["retained"].notna() & (frame["method"] != "barrier")]
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Expected", anchor=False)
        if known.empty:
            reasons = list(dict.fromkeys(found["why not"].get(label, {}).values()))
            told = "; ".join(reason.removeprefix("outside: ") for reason in reasons)
            st.info(f"No number is given here: {ui.plain(told) or 'see the notes above'}. You can still make the "
                    "merge and measure it.", icon=":material/help:")  # fmt: skip
        else:
            ui.chart(lab.draw_predictions(frame, measured), "expected",
                     "Accuracy that the merged network is expected to keep of each model's own, from the weights "
                     "alone, with 90 % intervals; diamonds were measured here.", data=frame)  # fmt: skip
            percent = st.column_config.NumberColumn(format="percent")
            shares = [c for c in frame if c in ("retained", "low", "high") or c.startswith("of ")]
            ui.table(frame, "expected", "A row per method: what it is expected to retain, with interval and reasons",
                     config=dict.fromkeys(shares, percent))  # fmt: skip
    with right:
        st.subheader("What the weights say", anchor=False)
        rows = [(term, value, found["meanings"].get(term, "")) for term, value in first["terms"].items()]
        terms = pd.DataFrame(rows, columns=["term", "value", "meaning"])
        ui.table(terms, "terms", "The terms behind the prediction, with what they mean",
                 config={"value": st.column_config.NumberColumn(format="%.3f"),
                         "meaning": st.column_config.TextColumn(width="large")})  # fmt: skip
    pairs = [m for m in found["merges"] if len(m["models"]) == 2]
    if len(pairs) > 1:
        with st.expander(f"All {len(pairs)} pairs, the most promising first", icon=":material/leaderboard:"):
            rows = [(" + ".join(m["models"]), m["best"], m["expected"]) for m in pairs]
            ranked = pd.DataFrame(rows, columns=["models", "best method", "expected"])
            ranked = ranked.sort_values("expected", ascending=False, na_position="last")
            ui.table(ranked, "pairs", "Pairs of the models by what their best method is expected to retain",
                     config={"expected": st.column_config.NumberColumn(format="percent")})  # fmt: skip
    if found["blocks"]:
        with st.expander("Block by block", icon=":material/view_list:"):
            blocks = pd.DataFrame.from_dict(found["blocks"], orient="index").rename_axis("block").reset_index()
            ui.table(blocks, "blocks", "What the weights say of every block", key="blocks-table")


def _sentence(finding: Mapping[str, Any]) -> str:
    words = finding.get("sentence")
    if words:
        return str(words)
    return "; ".join(str(finding[k]) for k in ("found", "remedy", "what") if finding.get(k))


def making(shelf: Shelf, names: list[str], base: str | None, best: str | None) -> tuple[Made, str, str] | None:
    """Choose a method, make the merge; the merge, its method and its recipe."""
    st.subheader("Make the merge", anchor=False)
    methods = lab.usable(len(names), base is not None, False)
    default = list(methods).index(best) if best in methods else 0
    left, right = st.columns([2, 3])
    method = left.selectbox("Method", list(methods), index=default, key="method", bind="query-params",
                            help="Methods that need data are run from the command line or from Python")  # fmt: skip
    left.caption(methods[method])
    align = left.toggle("Align first", key="merge_align", bind="query-params",
                        help="Move every model onto the base, or the first one, before merging: for models "
                             "trained apart")  # fmt: skip
    hyper: dict[str, Any] = {}
    with right:
        settings = lab.settings_of(method)
        boxes = st.columns(3) if settings else []
        for i, one in enumerate(settings):
            words, key = one.name.replace("_", " "), f"hyper-{method}-{one.name}"
            with boxes[i % 3]:
                if isinstance(one.default, bool):
                    value: float | bool = st.checkbox(words, one.default, key=key, bind="query-params")
                elif one.whole:
                    value = st.number_input(words, value=int(one.default), step=1, key=key, bind="query-params")
                else:
                    value = st.number_input(words, value=float(one.default), step=0.05, format="%g", key=key,
                                            bind="query-params")  # fmt: skip
            if value != one.default:
                hyper[one.name] = value
        if not settings:
            st.caption("This method has nothing to set.")
    of = [*(shelf.content(n) for n in names), base and shelf.content(base), method, sorted(hyper.items()), align]
    out = ui.here().private / "merged" / key_of(*of)[:24] / f"merged-{method}.safetensors"
    begun = ui.begun(MAKE, of)
    if begun is None and not st.button("Merge", type="primary", icon=":material/merge:"):
        return None
    files = [shelf.address(n) for n in names]
    made = ui.work(f"Merging by {method}", MAKE, files, base and shelf.address(base), method, hyper, align, str(out),
                   of=of)  # fmt: skip
    if made is None:
        return None
    text = lab.recipe([_relative(n) for n in names], base and _relative(base), method, hyper, align, out.name)
    results(made, text)
    return made, method, text


def _relative(name: str) -> str:
    return name.removeprefix(UPLOAD)


def results(made: Made, text: str) -> None:
    """The merged file and its recipe, to take away."""
    rows = pd.DataFrame(list(made.rows), columns=["tensor", "outcome", "reason"])
    counts = ", ".join(f"{n:,} {what}" for what, n in rows["outcome"].value_counts().items())
    path = Path(made.path)
    st.success(f"Merged in {made.seconds:.1f} s: {counts}.", icon=":material/check:")
    for note in made.notes:
        st.caption(ui.plain(note))
    with st.container(horizontal=True):
        ui.download(f"Merged file ({path.stat().st_size / 1e6:.2g} MB)", path.read_bytes, path.name,
                    "application/octet-stream", key="merged")  # fmt: skip
        ui.download("Recipe (TOML)", text, "recipe.toml", "application/toml", key="recipe")
        try:
            yaml = lab.mergekit(text)
        except WeightspaceError as error:
            st.caption(f"mergekit cannot do this: {ui.plain(error)}")
        else:
            ui.download("mergekit (YAML)", yaml, "mergekit.yml", "application/yaml", key="yaml")
    with st.expander("What became of every tensor", icon=":material/list:"):
        ui.table(rows, "tensors", "Every tensor: merged, copied or left out, and why")


def measuring(shelf: Shelf, names: list[str], made: Made) -> Measured | None:
    """Evaluate each model and the merge on test data."""
    st.subheader("Measure it", anchor=False)
    kind = st.segmented_control("On which data", ["Their own test data", "A file"], default="Their own test data",
                                key="data", bind="query-params", required=True,
                                help="Networks trained from recipes say what they were tested on. A file holds "
                                     "inputs and labels: safetensors or npz with two tensors, one called "
                                     "labels.")  # fmt: skip
    file = None
    if kind == "A file":
        given = st.file_uploader("Inputs and labels", key="examples")
        if given is None:
            return None
        folder = ui.here().private / "data"
        folder.mkdir(exist_ok=True, mode=0o700)
        file = str(uploads.keep(folder, given.name, given))
    of = [*(shelf.content(n) for n in names), made.path, file and _stamp(Path(file)), kind]
    if ui.begun(MEASURE, of) is None and not st.button("Measure", icon=":material/speed:"):
        return None
    models = {n: shelf.address(n) for n in names}
    found = ui.work("Measuring", MEASURE, models, made.path, file, len(names) == 2, of=of)
    return found if isinstance(found, Measured) else None


def shown_measure(shelf: Shelf, found: Measured, names: list[str], base: str | None, method: str,
                  expected: Mapping[str, Any] | None) -> None:  # fmt: skip
    left, right = st.columns([3, 2], gap="large")
    percent = st.column_config.NumberColumn(format="percent")
    with left:
        one, two = st.columns(2)
        one.metric("Retained, measured", f"{found.retained:.1%}")
        if expected and expected["value"] is not None:
            inside = expected["low"] <= found.retained <= expected["high"]
            two.metric("Expected", f"{expected['value']:.1%}", f"{expected['low']:.1%} to {expected['high']:.1%}",
                       delta_color="off", help="Inside the interval" if inside else "Outside the interval")  # fmt: skip
        ui.table(found.table(), "measured", "Accuracy of each model alone and of the merged one",
                 config=dict.fromkeys(("alone", "merged", "retained"), percent))  # fmt: skip
        for note in found.notes:
            st.caption(f":material/info: {ui.plain(note)}")
        keep(shelf, found, names, base, method)
    with right:
        if found.curves:
            curves = pd.DataFrame({words: values for words, (_, values) in found.curves.items()},
                                  index=next(iter(found.curves.values()))[0])  # fmt: skip
            ui.chart(draw_curves(found.curves), "barrier", "Accuracy on the straight path from A (0 %) to B "
                     "(100 %); a dip is the barrier between them.", data=curves)  # fmt: skip


def keep(shelf: Shelf, found: Measured, names: list[str], base: str | None, method: str) -> None:
    """Keep the measurement, so that later reports learn from it."""
    zoo = shelf.zoo
    if zoo is None or any(n.startswith(UPLOAD) for n in names) or not os.access(zoo.index, os.W_OK):
        return
    if st.button("Keep this measurement in the zoo", icon=":material/bookmark_add:",
                 help="Later reports on these models take it into account"):  # fmt: skip
        from weightspace.zoo import Zoo

        Zoo(zoo.folder).record_merge(names, method, merged=list(found.merged), alone=list(found.alone),
                                     **({"base": base} if base else {}))  # fmt: skip
        st.toast("Kept: reports on these models take it into account from now on.")


def page() -> None:
    shelf = ui.shelf()
    ui.title("merge", shelf)
    if ui.first_steps(shelf):
        return
    left, right = st.columns([3, 2])
    with left:
        names = ui.choose_many("Models to merge", shelf, "models", 8, help="Two to eight models of one architecture")
    parent = lab.common_parent([shelf.fact(n, "parent") for n in names], shelf.names) if names else None
    # A base that all records name is proposed once; it can be taken away.
    if parent and st.session_state.get("proposed") != (parent, *names) and "base" not in st.query_params:
        st.session_state["base"] = parent
    st.session_state["proposed"] = (parent, *names)
    with right:
        base = ui.choose("Base: what they were fine-tuned from", shelf, "base", optional=True,
                         help="Without it only models trained apart are predicted, and fewer methods can be "
                              "used")  # fmt: skip
    ui.need(len(names) >= 2, "Choose two models or more: children of one base merge best. In the zoo you can select "
                             "them in the table or on the map.")  # fmt: skip
    ui.need(base not in names, "The base is among the models to merge: take it out of one of the two boxes.")
    with ui.said():
        found = report(shelf, names, base)
    done: Measured | None = st.session_state.get("measured", {}).get((*names, base))
    measured = {} if done is None else {st.session_state["measured_by"]: done.retained}
    if found is not None:
        shown_report(found, names, measured)
    st.divider()
    with ui.said():
        merged = making(shelf, names, base, None if found is None else found["best"])
        if merged is None:
            return
        made, method, _ = merged
        result = measuring(shelf, names, made)
        if result is None:
            return
        first = None if found is None or not found["merges"] else found["merges"][0]
        expected = None if first is None else first["predictions"].get(method)
        if done is None or st.session_state.get("measured_by") != method:
            st.session_state["measured"] = {(*names, base): result}
            st.session_state["measured_by"] = method
            st.rerun()
        shown_measure(shelf, result, names, base, method, expected)


page()
