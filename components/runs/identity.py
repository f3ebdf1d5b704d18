"""Identity of runs: the values that determine a result, those that change only its rounding, and differences."""

import json
from collections.abc import Sequence
from typing import Any

from components.config import RENAMED, Config, flatten

# Keys that may differ between a run and its continuation: place, length, logging.
FREE_TO_CHANGE = (
    "device", "processes", "compile", "cuda_graph", "keep_last", "log_period", "checkpoint_period", "max_iters",
    "epochs", "patience", "output_dir", "resume", "timeout_s",
)  # fmt: skip
_LENGTHS = ("max_iters", "epochs", "patience")
# Keys of image preparation for training; the images themselves are identified by their hash.
_SEEN_IN_TRAINING = tuple(
    f"data.{key}"
    for key in (
        *("buckets", "min_sizes_px", "max_size_px", "horizontal_flip", "scale_jitter", "crop_size_px"),
        *("augment.", "repeat_threshold", "keep_empty_images"),
    )
)

# The sections that determine what is learned and how it is scored, and the keys in them that do not: paths, logging.
# FREE_TO_CHANGE is part of the latter except for lengths; a data set is identified by its hash.
_DECIDING = ("data.", "model.", "train.", "evaluate.")
_NOT_DECIDING = {f"train.{key}" for key in FREE_TO_CHANGE if key not in _LENGTHS} | {
    "data.base_url",
    "data.prepared_dir",
    "data.raw_dir",
    "data.timeout_s",
    "data.workers",
    "evaluate.backend",
    "evaluate.drawn_images",
}
# Keys that change only rounding: no part of the identity, but shown where two results differ.
_LAST_BITS = ("train.compile", "train.cuda_graph", "train.device", "train.processes")


def identity(config: Config) -> dict[str, Any]:
    """The values that determine a result, by dotted name, the seed included."""
    return deciding(config.flat())


def deciding(flat: dict[str, Any]) -> dict[str, Any]:
    """The values of a flat configuration that determine a result."""
    return {key: value for key, value in flat.items() if key.startswith(_DECIDING) and key not in _NOT_DECIDING}


def description(config: Config) -> dict[str, Any]:
    """Values to show beside a result: its identity except the seed, and those that change only rounding."""
    flat, decides = config.flat(), identity(config)
    return {key: value for key, value in flat.items() if (key in decides or key in _LAST_BITS) and key != "train.seed"}


def differences(identities: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all, each with its values in order; None where a key is absent."""
    keys = sorted({key for one in identities for key in one})
    values = {key: [one.get(key) for one in identities] for key in keys}
    return {key: listed for key, listed in values.items() if any(value != listed[0] for value in listed)}


def differences_of_descriptions(descriptions: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The differences of descriptions that files hold; a key that an earlier version did not know had its default."""
    defaults = _as_json(description(Config()))
    present = [{RENAMED.get(key, key): value for key, value in _as_json(one).items()} for one in descriptions]
    return differences([defaults | one for one in present])


def differences_beside_seed(one: Config, other: Config) -> list[str]:
    """Differences, other than the seed, of two configurations, as `key (value and value)`."""
    found = differences([identity(one), identity(other)])
    found.pop("train.seed", None)
    return [f"{key} ({json.dumps(a)} and {json.dumps(b)})" for key, (a, b) in found.items()]


def changes_since_checkpoint(state: dict[str, Any], config: Config, data_hash: str) -> list[str]:
    """Differences of a checkpoint's run from this one, as `key: then → now`; empty if it may be continued."""
    now = config.flat()
    must_stay = [
        key
        for key in now
        if key.startswith(("model.", *_SEEN_IN_TRAINING))
        or (key.startswith("train.") and key.removeprefix("train.") not in FREE_TO_CHANGE)
        # All rates of a cosine follow from the length, and with iters_range the steps of epochs, too.
        or (key in ("train.max_iters", "train.epochs") and config.train.schedule == "cosine")
        or (key == "train.epochs" and config.train.iters_range)
    ]
    then = Config().flat() | flatten(state["config"])  # a key that an earlier version did not know had its default
    found = differences([{key: one.get(key) for key in must_stay} for one in (then, now)])
    changes = [f"{key}: {json.dumps(before)} → {json.dumps(after)}" for key, (before, after) in found.items()]
    return changes + ([] if state["data_hash"] == data_hash else ["other training data"])


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from a file: tuples are lists there."""
    return dict(json.loads(json.dumps(values)))
