"""Checkpoints that are whole or not there, written by every rank and read onto any layout.

`boxes.py`: what a rank has of a tensor. `storage.py`: torch's distributed checkpointing with an index in JSON.
`folder.py`: the commit protocol. `store.py`: saving and loading by all ranks of a job. `lock.py`: one run a folder.
"""


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the ones before it are untouched."""
