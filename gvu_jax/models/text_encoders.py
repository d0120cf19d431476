"""Placeholder until the text-encoders branch is merged."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class T5Config:
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    vocab_size: int
