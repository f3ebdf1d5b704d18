"""Make the pictures of docs/pictures.md that need no browser: plots of an evaluation, copy-paste, tiles.

    python docs/gallery.py runs/shapes_demo

Of a run that was evaluated, with its data. The large image of the tiles is made of images of its val split.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import maskrcnn
from components import prepare
from components.params import load_stored
from model.data.index import CocoIndex, spread
from model.data.transforms import read_image
from model.inference.visualize import side_by_side

FOLDER = Path(__file__).parent / "images"
PLOTS = ("confusion_matrix", "f1_curves", "reliability")
COLUMNS, ROWS = 6, 4  # images in the large one
WIDTH_PX = 1200


def save(picture: Image.Image, name: str) -> None:
    """Write a picture for the page, at most as wide as it is shown."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDTH_PX, WIDTH_PX))
    picture.save(FOLDER / f"{name}.jpg", quality=85)


def copy_paste(run: Path) -> Image.Image:
    """Training images with objects pasted, as `prepare` draws them."""
    config = load_stored(run / "config.yaml")
    augment = config.data.augment.model_copy(update={"copy_paste": 1.0})
    with tempfile.TemporaryDirectory() as scratch:
        data = config.data.model_copy(update={"augment": augment, "prepared_dir": Path(scratch) / "prepared"})
        prepare.run(config.model_copy(update={"data": data}))
        return Image.open(data.prepared_dir / "augmented.png").copy()


def tiles(run: Path) -> Image.Image:
    """A large image: what is found in it as a whole, and with tiles."""
    index = CocoIndex.open(load_stored(run / "config.yaml").data.prepared_dir, "val")
    images = [read_image(index.image_path(i)) for i in spread(len(index), COLUMNS * ROWS)]
    height, width = images[0].shape[:2]
    large = np.concatenate([np.concatenate(images[row * COLUMNS : (row + 1) * COLUMNS], 1) for row in range(ROWS)])
    model = maskrcnn.load(run)
    side = math.ceil(1.25 * max(height, width))
    found = [model(large, threshold="best"), model(large, threshold="best", tile=side, overlap=0.4, whole=False)]
    titles = [f"the whole image: {len(found[0])} objects", f"--tile, --tiles-only: {len(found[1])} objects"]
    return side_by_side([one.draw() for one in found], titles)


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    run = parser.parse_args().run
    for name in PLOTS:
        save(Image.open(run / "plots" / f"{name}.png"), name)
    save(copy_paste(run), "copy_paste")
    save(tiles(run), "tiles")


if __name__ == "__main__":
    main()
