"""Sections of `params.yaml` for the network and its engine; `data_config.py` has the section `data`.

Each value is typed and its range checked here, where it is declared; nothing else checks it again. Sections are frozen:
a run never changes its own configuration. `components/config.py` declares the whole file.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from model.data_config import AugmentConfig as AugmentConfig
from model.data_config import DataConfig as DataConfig
from model.data_config import Folder as Folder
from model.data_config import Fraction as Fraction
from model.data_config import Section as Section
from model.data_config import Seed as Seed
from model.data_config import ShapesConfig as ShapesConfig

Resnet = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2"
]  # fmt: skip
LayerNormBody = Literal["convnext_tiny", "convnext_small", "swin_t"]  # torchvision's, with FPN only
Rgb = tuple[float, float, float]
Conventions = Literal["detectron2", "torchvision"]
Norm = Literal["frozen_batch_norm", "batch_norm", "sync_batch_norm", "group_norm"]
BATCH_NORMS = ("frozen_batch_norm", "batch_norm", "sync_batch_norm")
# Weights that torchvision publishes, by name: for the body alone, and for whole detectors.
TORCHVISIONS_BODIES, TORCHVISIONS_DETECTORS = ("imagenet", "imagenet_v2"), ("coco", "coco_v2")
# Normalisation of torchvision's weights: (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) times 255.
TORCHVISION_MEAN, TORCHVISION_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
LARGEST_ADAMW_LR = 0.01  # AdamW moves every weight by about its rate, in each step
_MAX_ITERS, _MAX_EPOCHS = 10**9, 1e6  # Python's dates hold the time that is left
SMALLEST_SIDE_PX = 1e-30  # any box that is not empty has longer sides


class ModelConfig(Section):
    """Network: an R-CNN with a ResNet, ConvNeXt or Swin body; the defaults are Mask R-CNN R50-FPN."""

    task: Literal["mask", "box", "proposals"] = "mask"  # Mask R-CNN, Faster R-CNN, or the region proposal network alone
    # Definition of anchors, RoIAlign, smallest boxes and mask pasting. It belongs to the weights: torchvision's
    # detectors need torchvision.
    conventions: Conventions = "detectron2"
    backbone: Resnet | LayerNormBody = "resnet50"
    stem_channels: PositiveInt = 64  # width of a ResNet: its stem and res2 have these, each later stage twice as many
    # Input of the heads: a pyramid; stage res4, with res5 as the head of each RoI; or stage res5.
    features: Literal["fpn", "c4", "c5"] = "fpn"
    res5_dilation: Literal[1, 2] = 1  # 2 (c5 only): res5 is dilated instead of strided, so that c5 has stride 16
    stride_in_1x1: bool = False  # position of a stage's stride: the 1×1 (MSRA's weights), or the 3×3 (torchvision's)
    # Pixels are 0 to 255; mean and std are in pixel_order. These belong to the weights.
    pixel_order: Literal["rgb", "bgr"] = "rgb"
    pixel_mean: Rgb = TORCHVISION_MEAN
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = TORCHVISION_STD
    weights: str = "imagenet"  # none, imagenet, imagenet_v2, coco, coco_v2, or the path of a file or of a run
    # Norm of a ResNet. Statistics of batch_norm are those of one process's images, of sync_batch_norm all processes'.
    norm: Norm = "frozen_batch_norm"
    # Norm of FPN, convolutional box head and mask head. Null: group_norm if that is `norm`, else none.
    head_norm: Norm | Literal["none"] | None = None
    # Frozen part of the body. 1: stem; 2: stem and layer1; … 5: all of it. Null: 2 with pre-trained weights, else 0.
    freeze_stages: Annotated[int, Field(ge=0, le=5)] | None = None
    fpn_channels: PositiveInt = 256
    # Two fully connected layers; convolutions and one such layer; res5 (c4 only).
    box_head: Literal["mlp", "conv", "res5"] = "mlp"
    box_head_channels: PositiveInt = 1024  # width of fully connected layers
    box_head_convs: PositiveInt = 4  # number of convolutions, for box_head `conv`
    box_head_conv_channels: PositiveInt = 256
    mask_head_channels: PositiveInt = 256
    mask_head_convs: NonNegativeInt = 4  # number of convolutions before the transposed one
    class_agnostic_boxes: bool = False  # one box per proposal instead of one per class
    # Anchors: one size per level P2 to P6; with c4 and c5, all sizes on the single level.
    anchor_sizes_px: tuple[PositiveFloat, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    # Region proposal network.
    rpn_convs: Literal[1, 2] = 1  # number of 3×3 convolutions of its head
    rpn_fg_iou: Fraction = 0.7
    rpn_bg_iou: Fraction = Field(default=0.3, description="0.3 in NVIDIA's code, 0.5 in its README")
    rpn_batch_size: PositiveInt = 256
    rpn_positive_fraction: Fraction = 0.5
    rpn_nms_iou: Fraction = 0.7
    rpn_pre_nms_top_n_train: PositiveInt = 2000  # per level
    rpn_pre_nms_top_n_test: PositiveInt = 1000
    rpn_post_nms_top_n_train: PositiveInt = 2000  # per image
    rpn_post_nms_top_n_test: PositiveInt = 1000
    # RoI heads.
    roi_fg_iou: Fraction = 0.5
    roi_bg_iou: Fraction = 0.5
    roi_batch_size: PositiveInt = 512
    roi_positive_fraction: Fraction = 0.25
    box_reg_weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (10.0, 10.0, 5.0, 5.0)
    box_pool_size: PositiveInt = 7
    mask_pool_size: PositiveInt = 14
    # RoIAlign samples per bin and axis; 0: adaptive, one per cell. Null: by conventions, detectron2 0, torchvision 2.
    # At most 128, the operator's own limit (MAX_SAMPLES of cuda_ops/operators/multilevel_roi_align.py).
    pool_sampling_ratio: Annotated[int, Field(ge=0, le=128)] | None = None
    # Detections.
    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    detections_per_image: PositiveInt = 100

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.rpn_bg_iou > self.rpn_fg_iou:
            raise ValueError(f"rpn_bg_iou must be at most rpn_fg_iou, got {self.rpn_bg_iou} > {self.rpn_fg_iou}")
        if self.roi_bg_iou > self.roi_fg_iou:
            raise ValueError(f"roi_bg_iou must be at most roi_fg_iou, got {self.roi_bg_iou} > {self.roi_fg_iou}")
        self._require_parts_that_fit()
        if self.norm_of_heads == "group_norm":
            widths = {"mask_head_channels": self.mask_head_channels}
            widths |= {"fpn_channels": self.fpn_channels} if self.features == "fpn" else {}
            widths |= {"box_head_conv_channels": self.box_head_conv_channels} if self.box_head == "conv" else {}
            for name, width in widths.items():
                if width % 32:
                    raise ValueError(f"{name} must be a multiple of 32 with group_norm, got {width}")
        if self.weights in TORCHVISIONS_BODIES + TORCHVISIONS_DETECTORS:
            self._require_torchvisions()
        return self

    def _require_parts_that_fit(self) -> None:
        """Check that body, features and heads fit together."""
        self._require_a_width_that_fits()
        if not self.is_resnet and (self.features != "fpn" or self.stride_in_1x1):
            got = f"features {self.features}" if self.features != "fpn" else "stride_in_1x1"
            raise ValueError(f"{self.backbone} must have features fpn and no stride_in_1x1, got {got}")
        if self.features == "fpn" and len(self.anchor_sizes_px) != 5:
            raise ValueError(
                f"anchor_sizes_px must give one size for each of the 5 levels P2 to P6, got {len(self.anchor_sizes_px)}"
            )
        if not self.anchor_sizes_px or not self.aspect_ratios:
            raise ValueError("anchor_sizes_px and aspect_ratios must list at least one value each, got none")
        if (self.box_head == "res5") != (self.features == "c4"):
            raise ValueError(
                f"box_head must be res5 with features c4, and only there, got {self.box_head} with {self.features}"
            )
        if self.features == "c4" and self.box_pool_size % 2:
            raise ValueError(f"box_pool_size must be even with c4, whose res5 halves it, got {self.box_pool_size}")
        if self.features == "c4" and self.mask_pool_size != self.box_pool_size:
            raise ValueError(
                "mask_pool_size must be box_pool_size with c4, whose heads share res5, "
                f"got {self.mask_pool_size} and {self.box_pool_size}"
            )
        if self.features == "c4" and (self.freeze_stages or 0) > 4:
            raise ValueError("freeze_stages must be at most 4 with c4, whose body ends with layer3, got 5")
        if self.res5_dilation == 2 and self.features != "c5":
            raise ValueError(f"res5_dilation must be 1 unless features is c5, got 2 with {self.features}")
        if self.stride_in_1x1 and self.backbone in ("resnet18", "resnet34"):
            raise ValueError(f"stride_in_1x1 must be false with {self.backbone}, whose blocks have no 1×1 convolution")
        has_convs = self.box_head == "conv" or (self.task == "mask" and self.mask_head_convs > 0)
        if self.features != "fpn" and not has_convs and self.head_norm not in (None, "none"):
            raise ValueError(f"head_norm must be none without FPN and convolutions in heads, got {self.head_norm}")

    def _require_a_width_that_fits(self) -> None:
        """Check that `stem_channels` is read, and can be divided into the groups of convolutions and norms."""
        width = self.stem_channels
        if not self.is_resnet and width != 64:
            raise ValueError(f"stem_channels must be 64, its default, with {self.backbone}, got {width}")
        step, reason = (32, "norm group_norm") if self.norm == "group_norm" else (16, self.backbone)
        if width % step:
            raise ValueError(f"stem_channels must be a multiple of {step} with {reason}, got {width}")

    def _require_torchvisions(self) -> None:
        """Check that torchvision's weights get the settings they were trained with."""
        wanted: dict[str, object] = {"stride_in_1x1": False} | {
            "pixel_order": "rgb", "pixel_mean": TORCHVISION_MEAN, "pixel_std": TORCHVISION_STD
        }  # fmt: skip
        if self.is_resnet:
            wanted["stem_channels"] = 64
        if self.norm == "group_norm" and self.is_resnet:  # they were trained with batch norm
            wanted["norm"] = "frozen_batch_norm"
        if self.weights in TORCHVISIONS_DETECTORS:
            is_v2 = self.weights == "coco_v2"
            wanted |= {"conventions": "torchvision", "backbone": "resnet50", "features": "fpn"}
            wanted |= {"box_head": "conv", "rpn_convs": 2} if is_v2 else {"box_head": "mlp", "rpn_convs": 1}
            if self.norm_of_heads not in (BATCH_NORMS if is_v2 else ("none",)):
                wanted["head_norm"] = wanted.get("norm", self.norm) if is_v2 else "none"
        elif self.weights == "imagenet_v2" and self.backbone in ("resnet18", "resnet34", *get_args(LayerNormBody)):
            raise ValueError(f"weights must be imagenet with {self.backbone}, which has no others, got imagenet_v2")
        wrong = {name: value for name, value in wanted.items() if getattr(self, name) != value}
        if wrong:
            needed = ", ".join(f"{name} must be {value}" for name, value in wrong.items())
            got = ", ".join(str(getattr(self, name)) for name in wrong)
            raise ValueError(f"{needed} with weights {self.weights!r}, got {got}")

    @property
    def norm_of_heads(self) -> Norm | Literal["none"]:
        """Norm of FPN, convolutional box head and mask head."""
        return self.head_norm or ("group_norm" if self.norm == "group_norm" else "none")

    @property
    def is_resnet(self) -> bool:
        """True if the body has the norm that `norm` says; others have layer norm."""
        return self.backbone in get_args(Resnet)

    @property
    def sampling_ratio(self) -> int:
        """RoIAlign samples per bin and axis; 0 is adaptive."""
        by_conventions = 0 if self.conventions == "detectron2" else 2
        return by_conventions if self.pool_sampling_ratio is None else self.pool_sampling_ratio

    @property
    def min_proposal_side_px(self) -> float:
        """Minimum side of a proposal; smaller ones are dropped. Detectron2 drops only empty ones."""
        return 1e-3 if self.conventions == "torchvision" else SMALLEST_SIDE_PX

    @property
    def min_detection_side_px(self) -> float:
        """Minimum side of a detection; smaller ones are dropped. Detectron2 drops only empty ones."""
        return 1e-2 if self.conventions == "torchvision" else SMALLEST_SIDE_PX

    @property
    def frozen_stages(self) -> int:
        """Number of frozen stages of the body, stem included."""
        if self.freeze_stages is not None:
            return self.freeze_stages
        return 0 if self.weights == "none" else 2


class TrainConfig(Section):
    """Training."""

    output_dir: Folder = Path("runs/default")
    seed: Seed = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    processes: NonNegativeInt = 1  # number of processes on this machine; 0: one per GPU
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = (
        "float32"  # type of convolutions and matrix products; weights stay float32
    )
    apex: Literal["auto", "off", "required"] = (
        "auto"  # apex's FusedSGD. auto: if installed and on a GPU; required: an error if it cannot be used
    )
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw needs other rates and decays, such as 1e-4 and 0.05
    deterministic: bool = (
        False  # bitwise equal losses on the same machine, at some cost on a GPU (CPU losses always are)
    )
    compile: bool = False  # torch.compile of the dense parts: a minute or more at the start, then faster steps
    # One launch per step: a CUDA graph per bucket. Needs one GPU and no accumulation; otherwise steps run without
    # graphs and the log says why. A failed capture ends training.
    cuda_graph: bool = False
    max_iters: Annotated[int, Field(ge=0, le=_MAX_ITERS)] = 90000  # 0: as many as `epochs` are
    # Length in epochs, of the data's size and batch_size, instead of max_iters and lr_steps (set these to 0 and []).
    epochs: Annotated[float, Field(ge=0.0, le=_MAX_EPOCHS)] = 0.0
    lr_epochs: tuple[Annotated[float, Field(gt=0.0, le=_MAX_EPOCHS)], ...] = ()  # lr_steps in epochs
    # Lowest and highest number of iterations that `epochs` may amount to; lr_epochs are stretched alike. Empty: any.
    iters_range: Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_ITERS)], ...], Field(max_length=2)] = ()
    # Training ends after this many evaluations (evaluate.every_epoch) without a better AP, and the best checkpoint is
    # then evaluated and exported, not the last. 0: never.
    patience: NonNegativeInt = 0
    batch_size: PositiveInt = 16  # images per step, over all micro-batches and processes
    accumulation_steps: PositiveInt = 1  # micro-batches per step
    base_lr: PositiveFloat = 0.02  # learning rate for lr_batch_size images per step; scaled linearly to batch_size
    lr_batch_size: PositiveInt = 16
    momentum: Fraction = 0.9  # sgd only; adamw's betas are 0.9 and 0.999
    weight_decay: NonNegativeFloat = 1e-4
    weight_decay_bias: NonNegativeFloat = 0.0
    bias_lr_factor: PositiveFloat = 2.0
    weight_decay_norm: NonNegativeFloat = 0.0
    # Learning rate of each block of the body, relative to the block after it; the stem counts as a block. 1: the same.
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    # After warm-up. multistep: times lr_gamma after each of lr_steps; cosine: half a cosine, to 0 after max_iters.
    schedule: Literal["multistep", "cosine"] = "multistep"
    lr_steps: tuple[PositiveInt, ...] = (60000, 80000)
    lr_gamma: PositiveFloat = 0.1
    warmup_iters: NonNegativeInt = 500
    warmup_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0 / 3.0
    # mlperf_linear: the rate rises by warmup_factor per step up to the scaled base_lr; it must not start below 0.
    warmup_method: Literal["linear", "constant", "mlperf_linear"] = "linear"
    clip_grad_norm: NonNegativeFloat = 0.0  # 0: no clipping
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.0  # decay of the moving average of weights, which is evaluated; 0: none
    )
    log_period: PositiveInt = 20
    checkpoint_period: PositiveInt = 2500
    keep_last: NonNegativeInt = 0  # number of newest checkpoints kept in addition to the best; 0: all
    max_nonfinite_steps: PositiveInt = 10  # training stops after this many in a row
    timeout_s: PositiveFloat = (
        1800.0  # maximum wait of a process for the others, loader workers included, before training stops
    )
    resume: bool = True  # continue from output_dir/last_checkpoint if there is one

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size must be a multiple of accumulation_steps, got {self.batch_size} and "
                f"{self.accumulation_steps}"
            )
        for name, steps in (("lr_steps", self.lr_steps), ("lr_epochs", self.lr_epochs)):
            if list(steps) != sorted(set(steps)):
                raise ValueError(f"{name} must be strictly increasing, got {list(steps)}")
        self._require_one_length()
        if self.optimizer == "adamw" and self.peak_lr >= LARGEST_ADAMW_LR:
            raise ValueError(
                f"base_lr must be below {LARGEST_ADAMW_LR} with adamw, once scaled to batch_size, got "
                f"{self.peak_lr:g}, a rate for sgd; 0.0001 is usual"
            )
        lowest = self.peak_lr - self.warmup_iters * self.warmup_factor
        if self.warmup_method == "mlperf_linear" and lowest < -1e-9 * self.peak_lr:
            raise ValueError(
                f"warmup_factor must be at most {self.peak_lr / self.warmup_iters:.6g} with mlperf_linear, which is "
                f"the rate {self.peak_lr:g} over "
                f"{self.warmup_iters} warmup_iters, got {self.warmup_factor:g}: the rate would start below 0"
            )
        return self

    def _require_one_length(self) -> None:
        """Check that the length is given once, in iterations or in epochs."""
        if self.epochs and (self.max_iters or self.lr_steps):
            raise ValueError(
                "max_iters must be 0 and lr_steps [] with epochs, which say the same (and lr_epochs the steps), got "
                f"{self.max_iters} and {list(self.lr_steps)} with {self.epochs:g} epochs"
            )
        if not self.epochs and not self.max_iters:
            raise ValueError("max_iters or epochs must be above 0, got 0 for both")
        if not self.epochs and (self.lr_epochs or self.iters_range):
            raise ValueError(
                f"lr_epochs and iters_range must be empty without epochs, got {list(self.lr_epochs)} and "
                f"{list(self.iters_range)}"
            )
        if self.iters_range and (len(self.iters_range) != 2 or self.iters_range[0] > self.iters_range[1]):
            raise ValueError(
                f"iters_range must be empty or a lowest and a highest number, got {list(self.iters_range)}"
            )

    @property
    def warmup_warning(self) -> str:
        """A sentence if training ends before warm-up does; empty with epochs, whose iterations the data decide."""
        if not 0 < self.max_iters <= self.warmup_iters:
            return ""
        return (
            f"train.warmup_iters: {self.warmup_iters} iterations of warm-up take all {self.max_iters} of training, so "
            f"the learning rate never reaches {self.peak_lr:g}; lower train.warmup_iters, or raise train.max_iters"
        )

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: base_lr scaled to batch_size."""
        return self.base_lr * self.batch_size / self.lr_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch, over all processes."""
        return self.batch_size // self.accumulation_steps


class EvaluateConfig(Section):
    """Evaluation of checkpoints, and the scores that end training early."""

    batch_size: PositiveInt = 8
    backend: Literal["auto", "hotcoco", "pycocotools"] = "auto"  # library that computes AP; auto: hotcoco if installed
    # Detections per image and class that count in AP, the surest first. 100 is COCO's: only AP at 100 compares with
    # published figures. For images with more objects of a class, raise this and model.detections_per_image.
    max_detections: PositiveInt = 100
    every_epoch: bool = False  # also evaluate during training, after each epoch
    epoch_period: PositiveInt = Field(default=1, description="with every_epoch: once in this many epochs")
    # Early stop, with every_epoch: training ends when both are reached (or the only one that model.task has); 0: never.
    target_bbox_ap: Fraction = Field(default=0.0, description="with every_epoch only")
    target_segm_ap: Fraction = Field(default=0.0, description="with every_epoch only")
    skip_eval: bool = False  # write predictions only
    split: Literal["train", "val"] = "val"
    drawn_images: NonNegativeInt = 16  # number of images drawn with their predictions
    # Test-time augmentation: detections at all scales, and of mirrored images, are merged; masks are averaged.
    # Scales are factors for data.eval_min_size_px, data.eval_max_size_px and data.buckets.
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    flip: bool = False
    soft_nms: Literal["off", "linear", "gaussian"] = "off"  # overlapping boxes lose score instead of being dropped
    soft_nms_sigma: PositiveFloat = 0.5  # sigma of `gaussian`
