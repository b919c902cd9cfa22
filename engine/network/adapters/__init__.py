"""The mathematics of one adapted layer, for every kind of network."""

from ..spec import Kind
from .adapter import Adapter
from .loha import LoHa
from .lokr import LoKr, factorization
from .lora import LoRA
from .split_lora import SplitLoRA

__all__ = ["ADAPTERS", "Adapter", "LoHa", "LoKr", "LoRA", "SplitLoRA", "factorization"]

ADAPTERS: dict[Kind, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}
