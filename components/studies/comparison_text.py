"""A comparison as tables and text: parameters that differ, differences of scores, and a verdict on each AP."""

import json
from typing import Any

from rich.table import Table

from components.runs.figures import DASH, interval, number
from model.scoring.names import IOU_TYPES, TITLES

_SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_OVER_IMAGES = (
    "The intervals are those of one run each over images, not over seeds: by paired bootstrap over the {images} images "
    "({resamples} resamples). They tell how much a difference depends on the images that are scored. They do not tell "
    "how much AP varies from seed to seed: for that, train several seeds with `maskrcnn stability`, and compare the "
    "folders of two studies."
)
_NO_VERDICT = (
    "No verdict: {one} only one seed, and a single run says nothing about how much AP varies from seed to seed. "
    "Train several seeds with `maskrcnn stability`, and compare the folders of two studies."
)


def parameter_table(comparison: dict[str, Any]) -> Table | str:
    """Table of the parameters that differ, with both values; a sentence if none do."""
    if not comparison["parameters"]:
        return "All parameters except seeds are equal."
    table = Table(title="parameters that differ", title_justify="left")
    for column in ("", comparison["before"]["name"], comparison["after"]["name"]):
        table.add_column(column, overflow="fold")
    for key, values in comparison["parameters"].items():
        table.add_row(key, *(json.dumps(value, ensure_ascii=False) for value in values))
    return table


def score_table(comparison: dict[str, Any]) -> Table:
    """Table of six scores of boxes and masks: both means, their difference, its interval and p value."""
    is_over_images = comparison["method"] == "images"
    what = "scores of one run each" if is_over_images else "means over seeds"
    table = Table(title=f"{what}, {comparison['images']} images", title_justify="left")
    interval_title = "95 % interval over images" if is_over_images else "95 % interval"
    for column in ("", comparison["before"]["name"], comparison["after"]["name"], "difference", interval_title, "p"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for iou_type in IOU_TYPES:
        for name in _SHOWN if iou_type in comparison else ():
            score = comparison[iou_type][name]
            cells = (number(score["before"], ".4f"), number(score["after"], ".4f"), number(score["difference"], "+.4f"))
            table.add_row(
                f"{TITLES[iou_type]} {name}",
                *cells,
                interval(score["interval"], "+.4f"),
                _p(score["p"]),
                end_section=name == _SHOWN[-1],
            )
    return table


def sentences(comparison: dict[str, Any], reason: str = "") -> list[str]:
    """Verdicts on the AP of boxes and of masks, and caveats.

    Args:
        reason: why two single runs have no interval over the images.
    """
    lines = [_verdict(comparison, iou_type) for iou_type in IOU_TYPES if iou_type in comparison]
    if reason:
        lines.append(f"No interval over the images: {reason}.")
    if comparison["method"] == "images":
        lines.append(_OVER_IMAGES.format(images=comparison["images"], resamples=comparison["resamples"]))
    elif comparison["method"] == "none":
        single = [side["name"] for side in (comparison["before"], comparison["after"]) if len(side["seeds"]) == 1]
        lines.append(_NO_VERDICT.format(one="both have" if len(single) == 2 else f"{single[0]} has"))
    else:
        lines.append(
            "The other scores are not corrected for multiple comparisons: one in twenty will look different by chance. "
            "Use them to explain a change in AP, not to prove one."
        )
    if not comparison["same_training_data"]:
        lines.append("They were trained on different data, which may explain any difference.")
    return lines


def _verdict(comparison: dict[str, Any], iou_type: str) -> str:
    score, before, after = comparison[iou_type]["AP"], comparison["before"], comparison["after"]
    difference, title = score["difference"], f"{TITLES[iou_type]} AP"
    change = number(difference, "+.4f")
    if score["interval"] is None:
        return f"{title}: {after['name']} has {change} against {before['name']}."
    if comparison["method"] == "images":
        ends = interval(score["interval"], "+.4f")
        return f"{title}: {after['name']} has {change} against {before['name']}, 95 % interval over images {ends}."
    if comparison["method"] == "paired":
        how = f"the same {len(before['seeds'])} seeds, paired"
    else:
        how = f"{len(before['seeds'])} and {len(after['seeds'])} seeds, Welch"
    ends, p = interval(score["interval"], "+.4f"), _p(score["p"], equals="= ")
    figures = f"{change}, 95 % interval {ends}, p {p}; {how}"
    low, high = score["interval"]
    if low <= 0 <= high:
        return (
            f"{title}: no significant difference ({figures}): it may be noise. More seeds could reveal a smaller one."
        )
    better = "better" if difference > 0 else "worse"
    return f"{title}: {after['name']} is {better} than {before['name']} by more than noise ({figures})."


def _p(value: float | None, *, equals: str = "") -> str:
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{equals}{value:.3f}"
