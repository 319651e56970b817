"""Directories <-> models: configs, safetensors, tokenizers, chat templates, hub ids."""

from dovetail.hub.load import load
from dovetail.hub.save import save
from dovetail.hub.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load", "load_tokenizer", "save"]
