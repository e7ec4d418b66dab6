"""The one import of mosaicml-streaming.

Its package imports torchvision for data sets of images that are not used here, and torchvision raises on import where
it was built for another torch (the CPU build of torch, say). An empty module in the place of `streaming.vision` lets
the rest load with any torch.
"""

import sys
import types

if "streaming" not in sys.modules:
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))

from streaming import MDSWriter, StreamingDataset
from streaming.base.format import Reader, reader_from_json
from streaming.base.shuffle import get_shuffle

__all__ = ["MDSWriter", "Reader", "StreamingDataset", "get_shuffle", "reader_from_json"]
