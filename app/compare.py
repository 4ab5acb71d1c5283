"""Compare: what differs between two networks, before and after their neurons are lined up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from weightspace.explorer import diff, ui
from weightspace.explorer.diff import Diff

VIEWS = ["Blocks", "Permutation", "Neurons", "Wiring"]
COMPARE = "weightspace.explorer.diff:compare"


def verdict(found: Diff, a: str, b: str) -> None:
    """The outcome in a sentence."""
    a, b = ui.plain(a), ui.plain(b)
    if found.same:
        st.success(f"{a} and {b} hold the same numbers.", icon=":material/check:")
        return
    if found.structure:
        st.warning(f"{a} and {b} are not one architecture: {len(found.structure)} differences. Tensors that both have "
                   "in one shape are compared.", icon=":material/difference:")  # fmt: skip
    one, two, three, four = st.columns(4)
    one.metric("Cosine of the weights", f"{found.before:.3f}", help="1: the same direction, 0: unrelated")
    if found.after is not None:
        moved = np.mean([m.moved for m in found.moves]) if found.moves else 0.0
        two.metric("After alignment", f"{found.after:.3f}", f"{found.after - found.before:+.3f}",
                   help=f"B's neurons moved onto A's by weight matching in {found.seconds:.2f} s; B computes "
                        "what it did")  # fmt: skip
        three.metric("Neurons moved", f"{moved:.0%}", help="Mean share over the axes that may be permuted")
        if found.after > 0.999 and found.before < 0.99:
            st.success(f"{b} is {a} with its neurons in another order.", icon=":material/swap_vert:")
    changed = found.blocks[found.blocks["change"] > 0] if len(found.blocks) else found.blocks
    four.metric("Tensors that changed", f"{len(changed)} of {len(found.blocks)}")
    if found.declined:
        st.info(f"Not aligned: {ui.plain(found.declined)}", icon=":material/info:")


def blocks(found: Diff, name: str) -> None:
    if found.blocks.empty:
        st.info("The two have no tensor in common, so there is nothing to compare block by block.")
        return
    words = {"change": "Size of the change", "cosine": "Cosine", "rank": "Rank of the change"}
    column = st.segmented_control("Measure", list(words), default="change", format_func=words.get, key="measure",
                                  bind="query-params", required=True)  # fmt: skip
    frame = found.blocks
    if column == "rank":
        frame = frame[frame["rank"].notna()]
    caption = {
        "change": "Norm of B − A over the norm of A, tensor by tensor",
        "cosine": "Cosine between the tensors of A and of B",
        "rank": "How many singular directions hold 90 % of the squared change: few for low-rank fine-tuning",
    }[column or "change"]
    if len(frame) > 40:
        caption += f"; the 40 of {len(frame)} tensors that changed most"
    ui.chart(diff.draw_blocks(frame, column or "change"), f"{name}-{column}", f"{caption}.")
    numbers = {c: st.column_config.NumberColumn(format="%.4f") for c in frame if "change" in c or "cosine" in c}
    ui.table(frame, f"{name}-blocks", "A row per tensor: change, cosine, rank, before and after alignment",
             config={**numbers, "elements": st.column_config.NumberColumn(format="localized")})  # fmt: skip


def permutation(found: Diff, name: str) -> None:
    if not found.moves:
        st.info(ui.plain(found.declined) or "There is no axis that may be permuted.", icon=":material/info:")
        return
    labels = {m.axis: f"{m.axis}: {m.size:,} elements, {m.moved:.0%} moved" for m in found.moves}
    axis = st.selectbox("Axis", list(labels), format_func=lambda x: labels.get(x, x), key="moved", bind="query-params")
    move = next(m for m in found.moves if m.axis == axis)
    ui.chart(diff.draw_move(move, ui.dark()), f"{name}-{axis}",
             f"Similarity of the elements of A to those of B along {axis}: scattered as they are, on the diagonal "
             f"once B is aligned. {move.moved:.0%} of {move.size:,} elements moved.")  # fmt: skip
    source = move.index.reshape(-1, move.size)[0]
    table = pd.DataFrame({"element of A": np.arange(move.size), "was element of B": source})
    ui.download("Permutation (CSV)", lambda: table.to_csv(index=False), f"{name}-{axis}.csv", "text/csv", key="moved")


def neurons(found: Diff, name: str) -> None:
    if not found.neurons:
        st.info("Neurons are compared where both networks are of one architecture that is "
                "wired.", icon=":material/info:")
        return
    axis = st.selectbox("Axis", list(found.neurons), key="of_axis", bind="query-params")
    before, after = found.neurons[axis]
    ui.chart(diff.draw_neurons(before, after), f"{name}-{axis}-neurons",
             f"How much the weights into and out of each of the {len(before):,} elements of {axis} "
             "changed.")  # fmt: skip
    frame = pd.DataFrame({"element of A": np.arange(len(before)), "change": before})
    if after is not None:
        frame["change after alignment"] = after
    frame = frame.sort_values(frame.columns[-1], ascending=False)
    ui.table(frame, f"{name}-{axis}-neurons", f"Change of every element of {axis}", height=260)


def structure(found: Diff, name: str) -> None:
    if not found.structure:
        st.success("Names, shapes and wiring are the same.", icon=":material/check:")
        return
    ui.table(pd.DataFrame(list(found.structure), columns=["what", "in A", "in B"]), f"{name}-wiring",
             "What differs in names, shapes and wiring")  # fmt: skip


def page() -> None:
    shelf = ui.shelf()
    ui.title("compare", shelf)
    if ui.first_steps(shelf):
        return
    left, right, switch = st.columns([4, 4, 2], vertical_alignment="bottom")
    with left:
        a = ui.choose("A, which stays", shelf, "a")
    with right:
        b = ui.choose("B, which is moved onto it", shelf, "b", position=1)
    align = switch.toggle("Align", value=True, key="align", bind="query-params",
                          help="Line B's neurons up with A's by weight matching, where the wiring is "
                               "proved")  # fmt: skip
    if a is None or b is None:
        return
    if a == b:
        st.info("Choose two different models.", icon=":material/lightbulb:")
        return
    found = ui.work(f"Comparing {a} with {b}", COMPARE, shelf.address(a), shelf.address(b), align,
                    of=[shelf.content(a), shelf.content(b), align])  # fmt: skip
    if found is None:
        return
    verdict(found, a, b)
    view = st.segmented_control("View", VIEWS, default="Wiring" if found.blocks.empty else "Blocks", key="show",
                                bind="query-params", required=True, label_visibility="collapsed")  # fmt: skip
    name = f"{a}-{b}".replace("/", "_")
    shown = {"Blocks": blocks, "Permutation": permutation, "Neurons": neurons, "Wiring": structure}
    shown[view or "Blocks"](found, name)
    with st.container(horizontal=True):
        ui.link("merge", "Score a merge of the two", models=[a, b])
        ui.link("model", f"Look at {a}", model=a)
        ui.link("model", f"Look at {b}", model=b)


page()
