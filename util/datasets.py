"""Names that forks import from here; each lives in `util.data`."""

from util.data.dataset import ImageDataset, build_pretrain_dataset, build_val_dataset
from util.data.find import ImageFiles, PathList, find_images
from util.data.labelled import build_dataset, build_transform
