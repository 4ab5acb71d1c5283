"""The model card of the pretrained metanets: data, recipe, command, figures and limits, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from math import isnan

from weightspace.metanets.metrics import Interval
from weightspace.metanets.training import Trained
from weightspace.pretrained.applicability import LEAST, NEIGHBOURS, Limits
from weightspace.pretrained.evaluation import RANKS, Coverage, Inside, Recall
from weightspace.pretrained.model import Shipped
from weightspace.pretrained.networks import Population
from weightspace.pretrained.recipe import Pretraining


def model_card(
    recipe: Pretraining,
    model: Shipped,
    found: Sequence[Population],
    recalls: Sequence[Recall],
    covered: Sequence[Coverage],
    inside: Sequence[Inside],
    left: Sequence[Inside],
) -> str:
    """The card as Markdown."""
    size = {name: sum(p.numel() for p in getattr(model, name).metanet.parameters()) for name in ("encoder", "accuracy")}
    return f"""# Pretrained metanets of weightspace

{model.name}, {date.today().isoformat()}. Apache-2.0, like weightspace. Made by `python -m weightspace.pretrained` from
`weightspace/pretrained/recipe.toml`; the weights are stored as float16, and everything below was measured with them.

- **encoder**: operator message passing, {size["encoder"]:,} parameters, {_plan(model.encoder)}. Trained by contrast: a
  network and the same one with its neurons rescaled and noise of up to {recipe.views.noise:g} standard deviations on
  each tensor are positives. A vector of {model.dimension} numbers: its output and {recipe.components} principal
  components of the training-free descriptor (weights {model.mixture[0]:.3g} and {model.mixture[1]:.3g}, of
  {len(recipe.mixtures)} pairs the one that found most among validation runs); distance 1 is the median between networks
  of different runs.
- **predictor of accuracy**: operator message passing, {size["accuracy"]:,} parameters, {_plan(model.accuracy)}.
  Regression of the test accuracy of image classifiers; it also hears what they answer to noise and is told statistics
  of their tensors.

Both read networks at the canonical point of their orbit under positive rescaling and sign flips, so that all known
symmetries leave vectors and predictions as they are. Names, formats, dtypes, counters and records do not count.

## Networks

Populations of `zoo/*.toml`, split by lineage (a run with all that descends from it) into training, validation,
calibration and test. The encoder is trained on at most {recipe.views.networks:,} networks of the training part.

{_networks(found)}

## Retrieval

"function" compares what networks answer to the same made-up inputs (`weightspace.retrieval.function`, no training),
"both" is the geometric mean of the encoder's distance and the descriptor's, and "auto" what `similar` takes by default:
all three where networks were asked the same, both after that.

{retrieval_table(recalls)}

## Predicted accuracy on runs that were not seen

Split-conformal intervals at 90 %; "inside" is the share of networks in the predictor's range, and the other columns
are of those.

{coverage_table(covered)}

## Range of applicability

A network is inside when its wiring is proved, it keeps the limits (encoder: {_limits(model.range.limits)}; predictor:
{_limits(model.accuracy_range.limits)}), and its distance to the {NEIGHBOURS}th nearest network of the training zoo, in
the encoder's output and in the descriptor, is not among the largest {LEAST:.0%} of held-out runs.

{applicability_table(inside)}

The same distances when a population is taken out of what they are measured from (its metanets have seen it, and limits
do not count): the share of its networks still inside.

{applicability_table(left)}

## Limits

- The training zoo is small: networks of {model.range.limits.parameters[0]:,} to {model.range.limits.parameters[1]:,}
  parameters trained for minutes on small images, image coordinates or characters. Nothing is known about others, and
  the range says so.
- The accuracy is that on the network's own data, which its weights do not name; a network fine-tuned on fewer classes
  has an easier task and a higher accuracy.
- The coverage holds for each population of calibration with 40 networks or more, and therefore is more than 90 % for
  most; other networks inside the range may be missed more often.
- Recall is counted on pools of the size given; in a larger zoo more lies between a network and its relatives.
- The order that the predictor gives within one population is weak where accuracies lie close together (Kendall τ of the
  table): it learned from all populations at once. A metanet trained on one (`weightspace train`) orders it better.
"""


def retrieval_table(rows: Sequence[Recall]) -> str:
    """Recall by pool, question and measure."""
    columns = ["pool", "question", "queries", "measure", *(f"recall@{k}" for k in RANKS)]
    body = []
    for row in rows:
        figures = [_figure(row.figures[k], row.measure != "chance") for k in RANKS]
        body.append([row.pool, row.question, str(row.queries), row.measure, *figures])
    return _table(columns, body)


def coverage_table(rows: Sequence[Coverage]) -> str:
    """Coverage, width and errors by population."""
    columns = ["population", "networks", "inside", "coverage", "mean width", "mean error", "Kendall τ"]
    body = [
        [
            r.population, str(r.networks), f"{r.inside:.1%}", "" if isnan(r.width) else _figure(r.coverage, True),
            *("" if isnan(x) else f"{x:.3f}" for x in (r.width, r.error, r.tau)),
        ]
        for r in rows
    ]  # fmt: skip
    return _table(columns, body)


def applicability_table(rows: Sequence[Inside]) -> str:
    """Shares of networks inside by population."""
    return _table(
        ["population", "networks", "inside", "reasons to be outside"],
        [[r.population, str(r.networks), f"{r.inside:.1%}", r.reasons] for r in rows],
    )


def _networks(found: Sequence[Population]) -> str:
    body = [
        [p.source.name, *(str(len(getattr(p, part))) for part in ("train", "validation", "calibration", "test")),
         "held out" if p.source.held_out else "", "yes" if p.source.accuracy else "no"]
        for p in found
    ]  # fmt: skip
    return _table(["population", "training", "validation", "calibration", "test", "", "accuracy learned"], body)


def _plan(trained: Trained) -> str:
    plan, config = trained.plan, trained.metanet.config
    inner = config.get("inner", config)
    size = f"width {inner['width']}, {inner['rounds']} rounds"
    return f"{size}, {len(trained.history)} epochs in batches of {plan.batch}, seed {plan.seed}"


def _limits(limits: Limits) -> str:
    return (
        f"{limits.parameters[0]:,} to {limits.parameters[1]:,} parameters, roles {', '.join(sorted(limits.roles))}, "
        f"activations {', '.join(sorted(limits.activations))}"
    )


def _figure(found: Interval, interval: bool) -> str:
    return f"{found.value:.3f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if interval else "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
