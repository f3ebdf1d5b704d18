"""Imitations of other tools' exports: the same images and objects in each tool's own layout and files.

Each image of 48 × 64 has a concave car and a triangular dog; their place follows from the image's number.
"""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image, ImageDraw

SIZE = HEIGHT, WIDTH = 48, 64
NAMES = ("car", "dog")
COUNT = 5
Points = list[tuple[float, float]]


def outlines(number: int) -> list[tuple[str, Points]]:
    """Label and points of each object of an image."""
    x, y = number, number / 2
    car = [(4 + x, 4 + y), (26 + x, 4 + y), (26 + x, 20.5 + y), (15 + x, 12 + y), (4 + x, 20.5 + y)]
    dog = [(34 + x, 26 + y), (52 + x, 26 + y), (43 + x, 40 + y)]
    return [("car", car), ("dog", dog)]


def flat(points: Points) -> list[float]:
    return [value for point in points for value in point]


def mask_of(points: Points) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([flat(points)], *SIZE))[:, :, 0].astype(bool)


def picture(number: int) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 60, (*SIZE, 3), dtype=np.uint8))
    for label, points in outlines(number):
        ImageDraw.Draw(image).polygon(points, fill=(220, 40, 40) if label == "car" else (40, 220, 220))
    return image


def save_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def part_of(number: int) -> str:
    return "val" if number % 5 == 4 else "train"


def yolo_lines(number: int) -> str:
    lines = []
    for label, points in outlines(number):
        values = [f"{x / WIDTH:.8f} {y / HEIGHT:.8f}" for x, y in points]
        lines.append(f"{NAMES.index(label)} {' '.join(values)}\n")
    return "".join(lines)


def yolo(root: Path, val: str = "val", prefix: str = "") -> Path:
    """Ultralytics' layout for segmentation: https://docs.ultralytics.com/datasets/segment/"""
    for number in range(COUNT):
        part = {"train": "train", "val": val}[part_of(number)]
        save_picture(root / "images" / part / f"{number}.png", number)
        labels = root / "labels" / part / f"{number}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text(yolo_lines(number))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: {prefix or '.'}\ntrain: images/train\nval: images/{val}\nnames:\n{names}")
    return root


def roboflow_yolo(root: Path) -> Path:
    """Roboflow's "YOLOv8" export: train/ and valid/ with images and labels, `../train/images` in data.yaml
    (https://docs.roboflow.com/datasets/dataset-versions/exporting-data).
    """
    for number in range(COUNT):
        part = {"train": "train", "val": "valid"}[part_of(number)]
        name = f"{number}_png.rf.{number:032x}"
        save_picture(root / part / "images" / f"{name}.jpg", number)
        (root / part / "labels").mkdir(exist_ok=True)
        (root / part / "labels" / f"{name}.txt").write_text(yolo_lines(number))
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['car', 'dog']\n"
    )
    (root / "test" / "images").mkdir(parents=True)
    return root


def label_studio_yolo(root: Path) -> Path:
    """Label Studio's "YOLO with Images": images, labels, classes.txt, notes.json
    (https://labelstud.io/guide/export#YOLO).
    """
    for number in range(COUNT):
        save_picture(root / "images" / f"a1b2c3d4-{number}.png", number)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"a1b2c3d4-{number}.txt").write_text(yolo_lines(number))
    (root / "classes.txt").write_text("car\ndog\n")
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "car"}, {"id": 1, "name": "dog"}]}')
    return root


def palette() -> list[int]:
    """VOC's colors (VOClabelcolormap of the development kit)."""
    colors = []
    for index in range(256):
        color, rest = [0, 0, 0], index
        for bit in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
        colors += color
    return colors


def save_indices(path: Path, indices: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette(palette())
    image.save(path)


def instances(number: int, *, reverse: bool = False) -> np.ndarray:
    """Numbers of the objects of an image, 1, 2, …"""
    found = np.zeros(SIZE, dtype=np.int64)
    order = list(enumerate(outlines(number), 1))
    for index, (_, points) in reversed(order) if reverse else order:
        found[mask_of(points)] = index
    return found


def voc(root: Path, *, masks: bool = True, texts: bool = True) -> Path:
    """VOC2012's folders (devkit_doc.pdf, sections 2 and 3.2)."""
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(COUNT):
        stem = f"2007_{number:06}"
        save_picture(root / "JPEGImages" / f"{stem}.jpg", number)
        entries = ""
        for label, points in outlines(number):
            rows, columns = np.nonzero(mask_of(points))
            entries += (
                f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{columns.min() + 1}</xmin>"
                f"<ymin>{rows.min() + 1}</ymin><xmax>{columns.max() + 1}</xmax><ymax>{rows.max() + 1}</ymax></bndbox>"
                "</object>"
            )
        if texts:
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><folder>VOC2012</folder><filename>{stem}.jpg</filename><size><width>{WIDTH}</width>"
                f"<height>{HEIGHT}</height><depth>3</depth></size><segmented>1</segmented>{entries}</annotation>"
            )
        if masks:
            numbers = instances(number)
            border = np.pad(numbers, 1)[2:, 1:-1] != numbers  # a void line, as VOC has around objects
            save_indices(root / "SegmentationObject" / f"{stem}.png", np.where(border & (numbers == 0), 255, numbers))
            classes = np.select([numbers == 1, numbers == 2], [7, 12], 0)  # car and dog are VOC's classes 7 and 12
            save_indices(root / "SegmentationClass" / f"{stem}.png", np.where(border & (numbers == 0), 255, classes))
        lists[part_of(number)].append(stem)
    folder = root / "ImageSets" / ("Segmentation" if masks else "Main")
    folder.mkdir(parents=True)
    for part, stems in lists.items():
        (folder / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return root


def cvat_masks(root: Path) -> Path:
    """CVAT's "Segmentation mask 1.1": colored masks, labelmap.txt, no XML
    (https://docs.cvat.ai/docs/dataset_management/formats/format-smask/).
    """
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("".join(f"{i}\n" for i in range(COUNT)))
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\ndog:51,221,255::\n"
    )
    colors = np.array(palette(), dtype=np.uint8).reshape(-1, 3)
    for number in range(COUNT):
        save_picture(root / "JPEGImages" / f"{number}.png", number)
        numbers = instances(number)
        classes = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], dtype=np.uint8)
        for folder, pixels in (("SegmentationObject", colors[numbers]), ("SegmentationClass", classes[numbers])):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def labelme_shape(label: str, points: Points, kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "points": [list(p) for p in points],
        "group_id": None,
        "shape_type": kind,
        "flags": {},
    } | more


def labelme(root: Path) -> Path:
    """labelme 5: a JSON file beside each image (labelme/_label_file.py)."""
    for number in range(COUNT):
        save_picture(root / f"{number}.png", number)
        tree = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [labelme_shape(label, points) for label, points in outlines(number)],
            "imagePath": f"{number}.png",
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
        (root / f"{number}.json").write_text(json.dumps(tree))
    return root


def png_text(image: Image.Image) -> str:
    stream = BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def cvat_mask(label: str, mask: np.ndarray, **more: str) -> str:
    """A mask as CVAT writes it: runs of its own rectangle, row by row, outside first."""
    rows, columns = np.nonzero(mask)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    cut = mask[top:bottom, left:right].ravel()
    edges = np.flatnonzero(np.diff(cut)) + 1
    runs = np.diff([0, *edges, len(cut)]).tolist()
    runs = [0, *runs] if cut[0] else runs
    extra = "".join(f' {name}="{value}"' for name, value in more.items())
    return (
        f'<mask label="{label}" source="manual" occluded="0" rle="{", ".join(map(str, runs))}" left="{left}" '
        f'top="{top}" width="{right - left}" height="{bottom - top}" z_order="0"{extra}></mask>'
    )


def cvat(root: Path, *, extra: str = "") -> Path:
    """CVAT for images 1.1: annotations.xml and images/
    (https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/). Cars are polygons, dogs masks.
    """
    entries = ""
    for number in range(COUNT):
        save_picture(root / "images" / f"{number}.png", number)
        (_, car), (_, dog) = outlines(number)
        text = ";".join(f"{x:.2f},{y:.2f}" for x, y in car)
        entries += (
            f'<image id="{number}" name="{number}.png" width="{WIDTH}" height="{HEIGHT}">'
            f'<polygon label="car" source="manual" occluded="0" points="{text}" z_order="0"></polygon>'
            f"{cvat_mask('dog', mask_of(dog))}{extra if number == 0 else ''}</image>"
        )
    labels = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in NAMES)
    (root / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><task><labels>{labels}</labels></task></meta>{entries}</annotations>"
    )
    return root


def datumaro(root: Path) -> Path:
    """Datumaro's JSON 1.0: annotations/<subset>.json, images/<subset>/. Cars are polygons, dogs masks with a box."""
    labels = [{"name": name, "parent": "", "attributes": []} for name in NAMES]
    for part in ("train", "val"):
        items = []
        for number in filter(lambda number: part_of(number) == part, range(COUNT)):
            save_picture(root / "images" / part / f"{number}.png", number)
            (_, car), (_, dog) = outlines(number)
            packed = coco_mask.encode(np.asfortranarray(mask_of(dog), dtype=np.uint8))
            rle = {"counts": packed["counts"].decode(), "size": list(SIZE)}
            common = {"attributes": {}, "z_order": 0}
            items.append(
                {
                    "id": str(number),
                    "attr": {},
                    "annotations": [
                        common | {"id": 0, "type": "polygon", "group": 0, "label_id": 0, "points": flat(car)},
                        common | {"id": 1, "type": "mask", "group": 1, "label_id": 1, "rle": rle},
                        common | {"id": 2, "type": "bbox", "group": 1, "label_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0]},
                        {"id": 3, "type": "caption", "group": 0, "attributes": {}, "caption": "A car."},
                    ],
                    "image": {"path": f"{number}.png", "size": list(SIZE)},
                }
            )
        tree = {"dm_format_version": "1.0", "media_type": 2, "infos": {}}
        tree |= {"categories": {"label": {"label_groups": [], "labels": labels, "attributes": []}}, "items": items}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{part}.json").write_text(json.dumps(tree))
    return root


def png_numbers(root: Path) -> Path:
    """A file of numbers for each image, class × 1000 + object in 16 bits."""
    (root / "masks").mkdir(parents=True)
    for number in range(COUNT):
        save_picture(root / "images" / f"{number}.png", number)
        values = np.select([instances(number) == 1, instances(number) == 2], [1001, 2001], 0)
        Image.fromarray(values.astype(np.uint16)).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("car\ndog\n")
    return root


def png_objects(root: Path) -> Path:
    """A file for each object."""
    for number in range(COUNT):
        save_picture(root / "images" / f"{number}.png", number)
        folder = root / "masks" / str(number)
        folder.mkdir(parents=True)
        for index, (label, points) in enumerate(outlines(number)):
            Image.fromarray(mask_of(points)).save(folder / f"{label}_{index}.png")
    return root


def coco(numbers: list[int], name: str, first_category: int = 0) -> dict[str, Any]:
    """COCO JSON of some images, with file names of the form `name`."""
    annotations: list[dict[str, Any]] = []
    for image_id, number in enumerate(numbers):
        for label, points in outlines(number):
            xy = np.array(points)
            box = [*xy.min(axis=0).tolist(), *(xy.max(axis=0) - xy.min(axis=0)).tolist()]
            entry = {"id": len(annotations), "image_id": image_id, "category_id": NAMES.index(label) + first_category}
            annotations.append(
                entry | {"bbox": box, "area": box[2] * box[3], "segmentation": [flat(points)], "iscrowd": 0}
            )
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": i + first_category, "name": name} for i, name in enumerate(NAMES)],
        "images": [
            {"id": i, "file_name": name.format(number), "height": HEIGHT, "width": WIDTH}
            for i, number in enumerate(numbers)
        ],
        "annotations": annotations,
    }


def roboflow_coco(root: Path) -> Path:
    """Roboflow's "COCO Segmentation" export: _annotations.coco.json in train/ and valid/; category 0 is that of the set
    (https://docs.roboflow.com/datasets/dataset-versions/exporting-data).
    """
    for part, own in (("train", "train"), ("valid", "val")):
        numbers = [number for number in range(COUNT) if part_of(number) == own]
        for number in numbers:
            save_picture(root / part / f"{number}_png.rf.0a.jpg", number)
        tree = coco(numbers, "{}_png.rf.0a.jpg", first_category=1)
        tree["categories"] = [{"id": 0, "name": "things", "supercategory": "none"}, *tree["categories"]]
        (root / part / "_annotations.coco.json").write_text(json.dumps(tree))
    return root


def cvat_coco(root: Path) -> Path:
    """CVAT's "COCO 1.0" of a task: images/default/, annotations/instances_default.json
    (https://docs.cvat.ai/docs/dataset_management/formats/format-coco/).
    """
    for number in range(COUNT):
        save_picture(root / "images" / "default" / f"{number}.png", number)
    (root / "annotations").mkdir()
    tree = coco(list(range(COUNT)), "{}.png", first_category=1)
    for record in tree["images"]:
        record["id"] += 1
    for entry in tree["annotations"]:
        entry["image_id"] += 1
        entry["attributes"] = {"occluded": False}
    (root / "annotations" / "instances_default.json").write_text(json.dumps(tree))
    return root


def label_studio_coco(root: Path) -> Path:
    """Label Studio's "COCO with Images": result.json, whose file names begin with images/
    (https://labelstud.io/guide/export#COCO).
    """
    for number in range(COUNT):
        save_picture(root / "images" / f"a1b2c3d4-{number}.png", number)
    (root / "result.json").write_text(json.dumps(coco(list(range(COUNT)), "images/a1b2c3d4-{}.png")))
    return root


def fiftyone_coco(root: Path) -> Path:
    """FiftyOne's COCODetectionDataset: data/, labels.json
    (https://docs.voxel51.com/user_guide/export_datasets.html#cocodetectiondataset).
    """
    for number in range(COUNT):
        save_picture(root / "data" / f"{number}.png", number)
    (root / "labels.json").write_text(json.dumps(coco(list(range(COUNT)), "{}.png")))
    return root
