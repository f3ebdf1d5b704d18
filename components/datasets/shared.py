"""Raw data of DVC experiments: a link to those of the user's working tree, so that none are fetched or drawn twice."""

from components.runs.experiment import in_working_tree
from model.config import DataConfig
from model.data.synthetic import holds_other_shapes


def link_raw(data: DataConfig) -> None:
    """Let data.raw_dir be a link if this is an experiment in a temporary clone that does not have the folder.

    An experiment with other `data.shapes` draws its own images, so that those of the tree stay as they are.
    """
    shared = in_working_tree(data.raw_dir).absolute()
    if data.raw_dir.exists() or shared == data.raw_dir.absolute():
        return
    if data.source == "shapes" and holds_other_shapes(data.shapes, shared):
        return
    if data.source != "custom":  # a missing folder of the user's own is an error
        shared.mkdir(parents=True, exist_ok=True)
    data.raw_dir.parent.mkdir(parents=True, exist_ok=True)
    data.raw_dir.symlink_to(shared, target_is_directory=True)
