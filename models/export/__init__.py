"""Models as Hugging Face folders, both ways: safetensors, config.json, tokenizer. No code is read or written.

Read in this order:

- ``forms``: the three forms of config.json, what each can express, how it is written
- ``read_config``: a config.json to what can be built here
- ``weights``: our tensors and the published ones that hold the same numbers
- ``folder``: a folder written whole, and read with every tensor accounted for
- ``byte_tokenizer``: the built-in tokenizer as a tokenizer.json
"""

from models.export.byte_tokenizer import byte_tokenizer_json
from models.export.folder import PublishedFolder, load_into, open_folder, write_folder
from models.export.forms import FORMS, Architecture, Form, Refused, architecture_of

__all__ = [
    "FORMS",
    "Architecture",
    "Form",
    "PublishedFolder",
    "Refused",
    "architecture_of",
    "byte_tokenizer_json",
    "load_into",
    "open_folder",
    "write_folder",
]
