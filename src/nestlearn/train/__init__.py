"""Training: a text corpus, a resumable loop, and the pictures of a run."""

from nestlearn.train.data import Corpus, load_text, stdlib_text
from nestlearn.train.run import TrainConfig, evaluate, train

__all__ = ["Corpus", "TrainConfig", "evaluate", "load_text", "stdlib_text", "train"]
