"""Section `data` of `params.yaml`: images and annotations, how they are batched and augmented.

The base class of all sections, and types of values that several of them have, are here, too.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _not_empty(path: str | Path) -> str | Path:
    if not str(path):
        raise ValueError('must name a folder, got ""; the current one is "."')
    return path


Folder = Annotated[Path, BeforeValidator(_not_empty)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's generators take 64 bits


class Section(BaseModel):
    """Part of the configuration: typed, frozen, and without unknown keys.

    A key is declared here alone: type, range, default and, as `Field(description=…)`, its comment in params.yaml.
    Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ShapesConfig(Section):
    """Generated data set (`data.source: shapes`)."""

    train_images: PositiveInt = 800
    val_images: PositiveInt = 100
    height_px: Annotated[int, Field(ge=64)] = 128
    width_px: Annotated[int, Field(ge=64)] = 128
    max_objects: PositiveInt = 5
    crowd_probability: Fraction = 0.05  # probability that an image has a crowd region
    seed: Seed = 0


class AugmentConfig(Section):
    """Augmentation in training, all of it off by default; a sample depends on train.seed, epoch and image alone."""

    # Colour, by torchvision.transforms.v2: factors are drawn from 1 - value to 1 + value, in random order.
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0  # maximum shift, as a fraction of the colour circle
    grayscale: Fraction = 0.0  # probability
    blur: Fraction = 0.0  # probability of a Gaussian blur, with a sigma of 0.1 to 2 px
    vertical_flip: Fraction = 0.0  # probability
    quarter_turns: bool = False  # turn by 0°, 90°, 180° or 270°, each as likely
    # Probability that objects of another training image are pasted; needs masks.
    copy_paste: Fraction = 0.0

    @property
    def changes_colors(self) -> bool:
        """True if an image may change other than in its geometry."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grayscale, self.blur))


class DataConfig(Section):
    """Images and annotations, and how they are batched."""

    source: Literal["shapes", "coco2014", "coco2017", "custom"] = "shapes"
    raw_dir: Folder = Path("data/raw")  # images and COCO JSON; read-only when the source is `custom`
    prepared_dir: Folder = Path("data/prepared")  # index and report written by `prepare`
    # Paths relative to raw_dir; empty: the source's own layout (for `custom`: images_train, instances_train.json, …).
    train_images: str = ""
    train_annotations: str = ""
    val_images: str = ""
    val_annotations: str = ""
    # For `custom` with one COCO JSON: share of its images that is val; train_images and train_annotations name both
    # splits then. An image goes by its id and split_seed alone: all seeds of a study learn from the same images.
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    split_seed: Seed = Field(default=0, description="with val_fraction only")
    base_url: str = "http://images.cocodataset.org"
    # A record that cannot be used is an error. With on_invalid=skip it is dropped and counted; with on_invalid=mend it
    # is repaired if that is safe, and else dropped.
    on_invalid: Literal["error", "skip", "mend"] = "error"
    # EXIF orientation of photos. auto: applied where the annotated size says so; where the size does not tell (half
    # turns, mirrored and square images), as for most images of the split. apply, ignore: for all images.
    exif: Literal["auto", "apply", "ignore"] = "auto"
    # Values that become 0 and 255 in 16-bit, 32-bit and float images, such as [0, 4095] for 12 bits or [0, 1]. Empty:
    # 0 to 65535 for integers, 0 to 255 for floats. It belongs to the weights: predictions use the same.
    pixel_range: Annotated[tuple[FiniteFloat, ...], Field(max_length=2)] = ()
    train_limit: NonNegativeInt = 0  # number of images of the split to use, lowest ids first; 0: all
    val_limit: NonNegativeInt = 0
    # Train also on images without any annotation, as pure background. Images with crowds alone, and those whose
    # annotations on_invalid dropped, are left out: they have objects.
    keep_empty_images: bool = False
    # Repeat-factor sampling: images of a class that fewer than this fraction of images have occur more often. 0: off.
    repeat_threshold: Fraction = 0.0
    min_sizes_px: tuple[PositiveInt, ...] = (800,)  # shorter side in training, one drawn per image
    max_size_px: PositiveInt = 1333  # maximum of the longer side
    eval_min_size_px: PositiveInt = 800
    eval_max_size_px: PositiveInt = 1333
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = ((800, 1088), (800, 1344), (1088, 800), (1344, 800))
    horizontal_flip: Fraction = 0.5
    # Large-scale jitter in training: the image is resized to fit crop_size_px times a factor drawn from this range,
    # then cropped to crop_size_px (height, width) at random; min_sizes_px and max_size_px are not used then. Empty:
    # off.
    scale_jitter: Annotated[tuple[PositiveFloat, ...], Field(max_length=2)] = ()
    crop_size_px: tuple[PositiveInt, PositiveInt] = Field(default=(1024, 1024), description="with scale_jitter only")
    augment: AugmentConfig = AugmentConfig()
    workers: NonNegativeInt = 2  # decoding processes; 0 decodes in the training process
    timeout_s: PositiveFloat = 300.0  # maximum wait for an image, or a batch of the workers, before it is an error
    shapes: ShapesConfig = ShapesConfig()

    @model_validator(mode="after")
    def _one_source_of_val(self) -> "DataConfig":
        if self.val_fraction and self.source != "custom":
            raise ValueError(
                f"val_fraction must be 0 for {self.source}, which has its own val; got {self.val_fraction}"
            )
        named = [name for name in ("val_images", "val_annotations") if getattr(self, name)]
        if self.val_fraction and named:
            raise ValueError(
                f"val_fraction takes val from the images of train, but {' and '.join(named)} names others; "
                f"set one of the two, got val_fraction {self.val_fraction}"
            )
        return self

    @model_validator(mode="after")
    def _buckets_hold_every_image(self) -> "DataConfig":
        if self.pixel_range and (len(self.pixel_range) != 2 or self.pixel_range[0] >= self.pixel_range[1]):
            raise ValueError(f"pixel_range must be empty or two ascending values, got {list(self.pixel_range)}")
        if not self.min_sizes_px:
            raise ValueError("min_sizes_px must list at least one size, got none")
        for side in [side for bucket in self.buckets for side in bucket]:
            if side % 32:
                raise ValueError(f"buckets must be multiples of 32 (the stride of the coarsest level), got {side}")
        if len(set(self.buckets)) != len(self.buckets) or not self.buckets:
            raise ValueError(f"buckets must be one or more different (height, width) pairs, got {self.buckets}")
        limits = [("eval_min_size_px", self.eval_min_size_px, self.eval_max_size_px)]
        if not self.scale_jitter:
            limits.append(("min_sizes_px", max(self.min_sizes_px), self.max_size_px))
        elif len(self.scale_jitter) != 2 or self.scale_jitter[0] > self.scale_jitter[1]:
            raise ValueError(
                f"scale_jitter must be empty or a lowest and a highest factor, got {list(self.scale_jitter)}"
            )
        elif self.crop_size_px not in self.buckets:
            raise ValueError(f"buckets must include crop_size_px with scale_jitter: add {list(self.crop_size_px)}")
        for name, short, long in limits:
            if short > long:
                raise ValueError(f"{name} must not exceed the longer side's limit, got {short} > {long}")
            for height, width in ((short, long), (long, short)):
                if not any(height <= h and width <= w for h, w in self.buckets):
                    raise ValueError(
                        f"buckets must hold a resized image of {height} × {width} (height × width, from {name}), got "
                        f"{self.buckets}; add [{-(-height // 32) * 32}, {-(-width // 32) * 32}]"
                    )
        return self
