"""Backdoor: scan a network, see where it sits, take it out, compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from weightspace.explorer import backdoors, ui, uploads
from weightspace.explorer.jobs import key_of
from weightspace.explorer.models import UPLOAD, Shelf

SCAN, LOCATE, EXCISE, BESIDE = (
    f"weightspace.explorer.backdoors:{name}" for name in ("scan", "locate", "excise", "beside")
)


def verdict(found: Mapping[str, Any]) -> None:
    """The outcome in a sentence, and how sure it is."""
    reason = ui.plain(found["reason"])
    told = f"{'Flagged' if found['flagged'] else 'Not flagged'}: {reason}"
    if found["flagged"]:
        st.error(told, icon=":material/gpp_bad:")
    else:
        st.success(told, icon=":material/verified_user:")
    one, two, three = st.columns(3)
    probability = found["probability"]
    one.metric("Probability of a backdoor", "–" if probability is None else f"{probability:.1%}",
               help="By the pretrained detector, if half of all networks had one" if probability is not None
               else f"No number is given: {found['applicability'].get('reason', '')}")  # fmt: skip
    rare = found["at"][backdoors.PRIORS[-1]]
    two.metric("If only 1 % of networks had one", "–" if rare is None else f"{rare:.1%}")
    p = found["p_value"]
    three.metric("p-value", "–" if p is None else f"{p:.2g}",
                 help="Share of clean networks that look as suspect, by tests that were not trained")  # fmt: skip
    if found["calibration"]:
        st.caption(f"How far to trust the probability: {backdoors.calibration_words(found['calibration'])}. Of clean "
                   f"networks {found['level']:.0%} are flagged.")  # fmt: skip
    if not found["applicable"]:
        st.info(f"The detector was trained on other networks than this one: "
                f"{ui.plain(found['applicability'].get('reason', ''))}",
                icon=":material/help:")  # fmt: skip
    if found["targets"]:
        targets = [(int(c), float(s)) for c, s in found["targets"]]
        left, right = st.columns(2, gap="large")
        with left:
            st.subheader("Which class it would serve", anchor=False)
            ui.chart(backdoors.draw_targets(targets, bool(found["flagged"])), "targets",
                     "Share of the suspicion by class, the most suspect first.",
                     data=pd.DataFrame(targets, columns=["class", "share"]))  # fmt: skip
        with right:
            st.subheader("What the tests saw", anchor=False)
            evidence = pd.DataFrame(list(found["evidence"].items()), columns=["test", "value"])
            if len(evidence):
                ui.table(evidence, "evidence", "What each test gave", height=300,
                         config={"value": st.column_config.NumberColumn(format="%.4g")})  # fmt: skip
            else:
                st.caption("No test gave a number for this network.")


def where(shelf: Shelf, name: str, target: int | None, base: str | None, file: str | None) -> Mapping[str, Any] | None:
    """The subspace: which elements and layers carry it."""
    st.subheader("Where it sits", anchor=False)
    st.caption("This is worked out for clean networks as well: whether there is a backdoor is for the scan to say.")
    of = [shelf.content(name), target, base and shelf.content(base), file]
    if ui.begun(LOCATE, of) is None and not st.button("Locate", icon=":material/my_location:"):
        return None
    out = ui.here().private / "subspaces" / f"{key_of(*of)[:24]}.safetensors"
    origin = base and shelf.address(base)
    found = ui.work("Locating", LOCATE, shelf.address(name), target, origin, file, str(out), of=of)
    if found is None:
        return None
    ways = {"cut": "a subnet stands apart from the rest", "response": "these react most to a trigger that was found"}
    st.markdown(f"**{found['size']:,}** of {found['total']:,} elements: {ways.get(found['method'], found['method'])}.")
    served = "" if found["target"] is None else f", serving class {found['target']}"
    scores = pd.DataFrame([(e["factor"], ", ".join(map(str, e["index"])), e["score"]) for e in found["elements"]],
                          columns=["axis", "element", "score"])  # fmt: skip
    ui.chart(
        backdoors.restyled(found["figure"], ui.dark()), "subspace",
        f"The axes of the network from input to output{served}; coloured elements carry what was found, lines are the "
        "weights between the strongest.", data=scores,
    )  # fmt: skip
    with st.expander("Elements, layers and singular values", icon=":material/list:"):
        ui.table(scores, "elements", "Elements by their score")
        ui.chart(backdoors.restyled(found["spectra"], ui.dark()), "subspace-spectra",
                 "Singular values of the blocks, and of the part that carries it.")  # fmt: skip
    path = Path(found["path"])
    ui.download("Subspace (safetensors)", path.read_bytes, f"{name}-subspace.safetensors", "application/octet-stream",
                key="subspace")  # fmt: skip
    return found


def take_out(shelf: Shelf, name: str, target: int | None, base: str | None, file: str | None,
             subspace: str | None) -> None:  # fmt: skip
    """Excise, scan again, compare."""
    st.subheader("Take it out", anchor=False)
    anew = file is None and st.checkbox(
        "Learn it anew from made-up pictures", key="anew",
        help="For networks that read images, where no examples are at hand: does more than projecting, but costs "
             "accuracy, which cannot be told without data",
    )  # fmt: skip
    method = "relearn" if anew else None
    of = [shelf.content(name), target, subspace, file, method]
    if ui.begun(EXCISE, of) is None and not st.button("Excise", icon=":material/content_cut:"):
        st.caption("Without examples what was located is pruned or projected out, which changes little. With about a "
                   "hundred clean inputs the network is learned anew from its own answers.")  # fmt: skip
        return
    stem = Path(name.removeprefix(UPLOAD)).stem
    out = ui.here().private / "excised" / key_of(*of)[:24] / f"{stem}-excised.safetensors"
    done = ui.work("Excising", EXCISE, shelf.address(name), subspace, target, file, method, str(out), of=of)
    if done is None:
        return
    if not done["changed"]:
        st.info(f"Nothing was changed: {ui.plain(done['reason'])}.", icon=":material/info:")
        return
    st.success(f"{done['method'].capitalize()}: {ui.plain(done['reason'])}.", icon=":material/check:")
    again = ui.work("Scanning the result", SCAN, str(out), None, file, of=[of, "again"], label="again")
    one, two, three = st.columns(3)
    if again is not None:
        value = again["probability"]
        p = again["p_value"]
        shown = f"{value:.1%}" if value is not None else "–" if p is None else f"p {p:.2g}"
        one.metric("Backdoor afterwards", shown, "flagged" if again["flagged"] else "not flagged", delta_color="off")
    if done["kept"] is not None:
        two.metric("Answered as before", f"{done['kept']:.1%}", help="Share of held-out inputs")
    if shelf.fact(name, "data") or shelf.fact(name, "task"):
        both = ui.work("Measuring accuracy", BESIDE, shelf.address(name), str(out), of=[of, "accuracy"], label="both")
        if isinstance(both, str):
            st.caption(f":material/info: Its accuracy was not measured: {ui.plain(both)}")
        elif both is not None:
            three.metric("Accuracy on its own test data", f"{both['after']:.1%}",
                         f"{100 * (both['after'] - both['before']):+.1f} points")  # fmt: skip
    changes = pd.DataFrame(sorted(done["changes"].items(), key=lambda kv: -kv[1]), columns=["tensor", "change"])
    with st.expander("What was changed", icon=":material/list:"):
        ui.table(changes, "changes", "Tensors by the size of their change",
                 config={"change": st.column_config.NumberColumn(format="percent")})  # fmt: skip
    with st.container(horizontal=True):
        ui.download("Excised model", out.read_bytes, out.name, "application/octet-stream", key="excised")
        if st.button("Compare before and after", icon=":material/compare_arrows:"):
            folder = ui.upload_folder(make=True)
            assert folder is not None
            with out.open("rb") as stream:
                kept = uploads.keep(folder, out.name, stream)
            from weightspace.explorer.models import index

            index(str(folder), 1)
            st.switch_page("compare.py", query_params={**ui.kept(), "a": name, "b": UPLOAD + kept.name})


def page() -> None:
    shelf = ui.shelf()
    ui.title("backdoor", shelf)
    if ui.first_steps(shelf):
        return
    left, right = st.columns(2)
    with left:
        name = ui.choose("Model", shelf, "model")
    with right:
        base = ui.choose("Base: what it was fine-tuned from", shelf, "base", optional=True,
                         help="Where it is known, what fine-tuning changed is tested too")  # fmt: skip
    with st.expander("A few clean examples (they make every step better, none is needed)", icon=":material/image:"):
        given = st.file_uploader("Inputs, with labels if you have them", key="clean",
                                 help="safetensors, npz or pt: a tensor of inputs, and one called labels")  # fmt: skip
    file = None
    if given is not None:
        folder = ui.here().private / "data"
        folder.mkdir(exist_ok=True, mode=0o700)
        with ui.said():
            file = str(uploads.keep(folder, given.name, given))
    if name is None:
        return
    ui.need(name != base, "The base is the model itself: choose another one, or none.")
    of = [shelf.content(name), base and shelf.content(base), file]
    found = ui.work(f"Scanning {name}", SCAN, shelf.address(name), base and shelf.address(base), file, of=of)
    scanned = ui.begun(SCAN, of)
    if found is None and (scanned is None or scanned.state != "failed"):
        return
    target = None
    if found is not None:
        verdict(found)
        if found["target"] is not None and found["flagged"]:
            target = int(found["target"])
    st.divider()
    with ui.said():
        subspace = where(shelf, name, target, base, file)
    st.divider()
    with ui.said():
        take_out(shelf, name, target, base, file, None if subspace is None else str(subspace["path"]))


page()
