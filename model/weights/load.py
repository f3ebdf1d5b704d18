"""Initial weights: from scratch, from torchvision, or from a file of any known format, with a report of what was used.

`model.weights` is none, imagenet, imagenet_v2, coco, coco_v2, or the path of a state dict, a checkpoint, or a pickle of
Detectron(2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from model.config import TORCHVISIONS_BODIES, TORCHVISIONS_DETECTORS, ModelConfig
from model.network.layers import FrozenBatchNorm2d
from model.network.mask_rcnn import MaskRCNN
from model.weights.conventions import OLD_NAMES, check_conventions
from model.weights.file import StoredWeights, WeightsError, read_stored_weights
from model.weights.names import DESCRIPTIONS, NamedWeights, rename_weights
from model.weights.published import COCO_CLASSES, FetchError, Published, fetch, published_detector

PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
# Parts that a file may lack as a whole; they start at random then. Parts of file and network are otherwise the same.
PARTS = ("backbone.fpn.", "rpn.", "roi_heads.box_", "roi_heads.mask_")
_SHOWN = 3  # names of a list in the log


@dataclass(frozen=True)
class WeightsReport:
    """Report of `load_weights`, for the log."""

    source: str
    matched: int
    initialised: Mapping[str, str] = field(default_factory=dict)  # parameter that starts at random → reason
    unused: Mapping[str, str] = field(
        default_factory=dict
    )  # entry of the file without a counterpart in the network → reason
    note: str = ""

    def __str__(self) -> str:
        if self.source == "none":
            return "weights: from scratch"
        text = f"weights: {self.source}: {self.matched} tensors loaded"
        text += "".join(
            f", {len(names)} start at random: {_described(reason, names)}"
            for reason, names in _by_reason(self.initialised)
        )
        text += "".join(
            f", {len(names)} not used: {_described(reason, names)}" for reason, names in _by_reason(self.unused)
        )
        return text + (f"; {self.note}" if self.note else "")


def load_weights(
    model: MaskRCNN, config: ModelConfig, class_names: Sequence[str], category_ids: Sequence[int]
) -> WeightsReport:
    """Initialise the network as `model.weights` says.

    Raises:
        WeightsError: if a file is missing, damaged, unsafe or cannot be fetched, or has another architecture or other
            conventions.
    """
    if config.weights == "none":
        return WeightsReport("none", 0)
    if config.weights in (*TORCHVISIONS_BODIES, *TORCHVISIONS_DETECTORS):
        try:
            if config.weights in TORCHVISIONS_BODIES:
                return _load_body(model, config)
            return load_coco(model, config, class_names, category_ids)
        except FetchError as error:
            raise FetchError(f"{error}; to train without any: model.weights=none model.norm=group_norm") from error
    stored = read_stored_weights(Path(config.weights))
    named = rename_weights(stored, config, config.weights)
    if OLD_NAMES in stored.tensors:
        absorb_eps(named.tensors)
    has_conventions = check_conventions(stored, named, config, config.weights)
    note = (
        ""
        if has_conventions
        else "the file does not state model.pixel_*, stride_in_1x1 and conventions: your settings are assumed to match"
    )
    return fit_weights(model, named, f"{config.weights} ({DESCRIPTIONS[named.format]})", note)


def fit_weights(model: MaskRCNN, named: NamedWeights, source: str, note: str = "") -> WeightsReport:
    """Load all tensors that fit; parts missing as a whole, and predictors for other classes, keep their random values.

    Raises:
        WeightsError: if a tensor of the body, or of a part that both have, is missing, has another shape or is one too
            many, or if a frozen norm would keep values that no training has found.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = named.tensors
    absent_parts = [part for part in PARTS if not any(name.startswith(part) for name in state)]
    misfits = {name for name in own if name in state and own[name].shape != state[name].shape}
    if misfits & {name for name in own if name.startswith(PREDICTORS)}:
        misfits |= {name for name in own if name.startswith(PREDICTORS)}  # all predictors share the number of classes
    initialised = {}
    for name in own:
        if name in misfits and name.startswith(PREDICTORS):
            initialised[name] = "another number of classes"
        elif name not in state and name.startswith(tuple(absent_parts)):
            initialised[name] = "the file has no such part"
    _require_fit(own, state, initialised, source)
    for name in initialised:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), FrozenBatchNorm2d):
            raise WeightsError(
                f"{source}: must hold statistics for frozen batch norms, but has no {name}; set model.head_norm to "
                "none, batch_norm, sync_batch_norm or group_norm"
            )
    fitting = {name: value for name, value in state.items() if name in own and name not in initialised}
    model.load_state_dict(fitting, strict=False)
    unused = dict(named.unused) | {name: "the network has no such part" for name in state if name not in own}
    return WeightsReport(source, len(fitting), initialised, unused, note)


def _require_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], initialised: Mapping[str, str], source: str
) -> None:
    wrong = [
        name for name in own if name not in initialised and getattr(state.get(name), "shape", None) != own[name].shape
    ]
    parts = [part for part in PARTS if any(name.startswith(part) for name in own)]
    wrong += [name for name in state if name not in own and name.startswith(tuple(parts))]
    if not wrong:
        return
    example = wrong[0]
    wanted, got = (str(tuple(names[example].shape)) if example in names else "absent" for names in (own, state))
    raise WeightsError(
        f"{source}: must hold the weights of this network, but {len(wrong)} of {len(own)} tensors do not fit: "
        f"{example} must be {wanted}, got {got}; check model.backbone, model.features, model.norm, model.head_norm, "
        "model.box_head, model.rpn_convs and the widths under `model`"
    )


def _load_body(model: MaskRCNN, config: ModelConfig) -> WeightsReport:
    from torchvision.models import get_model_weights  # more than a second, which other weights need not pay

    version = "IMAGENET1K_V2" if config.weights == "imagenet_v2" else "IMAGENET1K_V1"
    torchvisions = get_model_weights(config.backbone)[version]
    published = Published(str(torchvisions), torchvisions.url)
    named = rename_weights(StoredWeights(fetch(published)), config, str(published))
    return fit_weights(model, named, f"torchvision's {published}")


def load_coco(
    model: MaskRCNN, config: ModelConfig, class_names: Sequence[str], category_ids: Sequence[int]
) -> WeightsReport:
    """Load the detector of torchvision that `model.weights` names, with the rows of these classes if COCO has them.

    Raises:
        FetchError: if the file is not here and cannot be fetched.
        WeightsError: if it has another architecture.
    """
    published = published_detector(config.weights, config.task)
    named = rename_weights(StoredWeights(fetch(published)), config, str(published))
    if config.weights == "coco":
        absorb_eps(named.tensors)
    if all(COCO_CLASSES.get(id) == name for id, name in zip(category_ids, class_names, strict=True)):
        named.tensors.update(rows_of_classes(named.tensors, category_ids))
    return fit_weights(model, named, f"torchvision's {published}")


def absorb_eps(state: dict[str, Tensor]) -> None:
    """Subtract our batch norm's eps from the variances of the first detectors, which were trained with eps 0."""
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = value - FrozenBatchNorm2d.eps


def rows_of_classes(state: Mapping[str, Tensor], category_ids: Sequence[int]) -> dict[str, Tensor]:
    """Rows of torchvision's 91-way predictors, which are indexed by COCO's ids, for these classes."""
    rows = [0, *category_ids]
    picked = {}
    for name, value in state.items():
        if name.startswith(PREDICTORS):
            is_boxes = ".bbox_pred." in name  # four rows per class
            picked[name] = value.unflatten(0, (-1, 4))[rows].flatten(0, 1) if is_boxes else value[rows]
    return picked


def _by_reason(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Group names by reason."""
    unique = dict.fromkeys(reasons.values())
    return [(reason, [name for name in reasons if reasons[name] == reason]) for reason in unique]


def _described(reason: str, names: Sequence[str]) -> str:
    return f"{reason} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
