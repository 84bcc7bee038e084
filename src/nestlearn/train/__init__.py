"""Training: a text corpus, a resumable loop, and the pictures of a run."""

from nestlearn.train.config import TrainConfig
from nestlearn.train.data import Corpus, load_text, stdlib_text
from nestlearn.train.losses import evaluate
from nestlearn.train.run import train

__all__ = ["Corpus", "TrainConfig", "evaluate", "load_text", "stdlib_text", "train"]
