"""What the stages agree on: frames, labels, the files that carry them, and what a stage hands back."""

from shards.frame import Frame, Origin
from shards.label import Label, Level
from shards.manifest import Manifest, ManifestError
from shards.outcome import Clock, Failure, FailureClass, Outcome, Receipt, Timing
from shards.reader import (
    AlteredShardError,
    Batch,
    HalfWrittenShardError,
    MissingDatasetError,
    MissingShardError,
    NotAShardError,
    Shard,
    ShardError,
    ShardVersionError,
    TruncatedShardError,
    WrongKindError,
    gather_labels,
    open_shard,
)
from shards.settings import Settings, SettingsError, parse_settings, read_toml
from shards.writer import MixedLevelsError, merge_labels, write_frames, write_labels

__all__ = [
    "AlteredShardError",
    "Batch",
    "Clock",
    "Failure",
    "FailureClass",
    "Frame",
    "HalfWrittenShardError",
    "Label",
    "Level",
    "Manifest",
    "ManifestError",
    "MissingDatasetError",
    "MissingShardError",
    "MixedLevelsError",
    "NotAShardError",
    "Origin",
    "Outcome",
    "Receipt",
    "Settings",
    "SettingsError",
    "Shard",
    "ShardError",
    "ShardVersionError",
    "Timing",
    "TruncatedShardError",
    "WrongKindError",
    "gather_labels",
    "merge_labels",
    "open_shard",
    "parse_settings",
    "read_toml",
    "write_frames",
    "write_labels",
]
