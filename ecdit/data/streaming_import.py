"""The one import of mosaicml-streaming, with any build of torch.

Its package imports torchvision for data sets of images that are not used here: an empty module in the place of
`streaming.vision` makes that unnecessary. It also imports transformers, which settles then whether there is a
torchvision: one that cannot be loaded is hidden before.
"""

import sys
import types

from ecdit.data.torchvision_guard import hide_broken_torchvision

hide_broken_torchvision()
if "streaming" not in sys.modules:
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))

from streaming import MDSWriter, StreamingDataset
from streaming.base.compression import decompress
from streaming.base.format import Reader, reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.shuffle import get_shuffle
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader

__all__ = [
    "DOWNLOADER_MAPPINGS",
    "CloudDownloader",
    "MDSWriter",
    "Reader",
    "StreamingDataset",
    "decompress",
    "get_hash",
    "get_shuffle",
    "reader_from_json",
]
