"""Hope among Hugging Face's models; importing this registers it with the Auto classes."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError('nestlearn.hf needs transformers 5: pip install "nestlearn[hf]"')

from .cache import HopeCache
from .config import HopeConfig
from .modeling import HopeForCausalLM, HopeModel

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel"]
