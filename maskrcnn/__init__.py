"""Find and segment objects from Python.

    import maskrcnn

    model = maskrcnn.load("coco_v2")  # or coco, a checkpoint, a run's folder, a file of weights, models:/NAME@champion
    found = model("photo.jpg")
    for one in found:
        print(one.label, one.score, one.box, one.mask.sum())
    found.draw().save("drawing.jpg")

To import it takes no time; torch is imported by `load`. docs/predict.md has more uses.
"""

from maskrcnn.found import Found, Instance
from maskrcnn.model import Model, load

__all__ = ["Found", "Instance", "Model", "load"]
